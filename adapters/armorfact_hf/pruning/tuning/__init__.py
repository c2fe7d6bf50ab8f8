"""Several pruned layers tuned together: one decoder block, or the last few, after each layer by itself."""
