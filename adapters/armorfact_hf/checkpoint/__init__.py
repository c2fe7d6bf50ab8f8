"""Pruned models on disk: what config.json says, checks of the files, loading and saving."""
