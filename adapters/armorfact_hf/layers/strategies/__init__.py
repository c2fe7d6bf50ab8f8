"""The ways to multiply with a pruned layer, a file each."""
