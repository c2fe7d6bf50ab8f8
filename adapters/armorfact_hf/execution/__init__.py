"""How a pruned layer runs: strategies for the product with its 2:4 core, and which is chosen when."""
