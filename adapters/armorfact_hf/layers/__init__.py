"""A pruned linear layer, and the ways to run it."""
