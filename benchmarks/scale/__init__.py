"""How long a large model takes on many workers: a simulation on costs measured on a small model of its shape."""
