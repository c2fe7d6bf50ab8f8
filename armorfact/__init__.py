"""armorfact: W ~ A C B, a 2:4 sparse core between two thin block-diagonal wrappers."""

from armorfact.driver import Progress, Sweep
from armorfact.factorization import factorize
from armorfact.initial import magnitude, nowag, sparsegpt, wanda
from armorfact.initial.sparsegpt import DampingWarning
from armorfact.packed import Core
from armorfact.pattern import Pattern
from armorfact.problem import Factors, Problem
from armorfact.quantization import quantize_core
from armorfact.result import BlockDiagonal, Result
from armorfact.sizes import auto_block
from armorfact.solvers import Adam, Best, Exact, Gradient, Solver, State
from armorfact.solvers.exact import Extrapolation
from armorfact.status import Ending, Status
from armorfact.wrapper_quantization import quantize_wrappers

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "Best",
    "BlockDiagonal",
    "Core",
    "DampingWarning",
    "Ending",
    "Exact",
    "Extrapolation",
    "Factors",
    "Gradient",
    "Pattern",
    "Problem",
    "Progress",
    "Result",
    "Solver",
    "State",
    "Status",
    "Sweep",
    "auto_block",
    "factorize",
    "magnitude",
    "nowag",
    "quantize_core",
    "quantize_wrappers",
    "sparsegpt",
    "wanda",
]
