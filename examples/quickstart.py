"""The README's example: factorize a real layer and compare with SparseGPT."""

import sys

import numpy as np

from armorfact import factorize

layer = np.load(sys.argv[1])  # W (d_out, d_in) and XXt (d_in, d_in)
result = factorize(layer["W"], layer["XXt"], block=128)
print(result)
print(f"{result.initial_loss / result.loss:.1f} times below SparseGPT")
