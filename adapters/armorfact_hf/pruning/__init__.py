"""Prune a model in memory, one decoder block after another."""
