"""How fast pruned layers and whole models run."""
