"""Everything that a CUDA device can tell within minutes, most informative first; see `benchmarks.gpu.__main__`."""
