"""Everything the user passes in is checked here, before any work is done."""

from armorfact.validate.choices import callback, init, one_of, seed, solver
from armorfact.validate.factorizations import factorization, fits, integer_core
from armorfact.validate.grams import as_given, gram, output_gram
from armorfact.validate.weights import scaled, weight, working, working_dtype

__all__ = [
    "as_given",
    "callback",
    "factorization",
    "fits",
    "gram",
    "init",
    "integer_core",
    "one_of",
    "output_gram",
    "scaled",
    "seed",
    "solver",
    "weight",
    "working",
    "working_dtype",
]
