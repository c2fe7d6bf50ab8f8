"""Products with a packed 2:4 core: compiled by numba on the CPU, by Triton on a GPU."""
