"""A transformers model taken apart: its decoder blocks and linear layers, and what flows through them."""
