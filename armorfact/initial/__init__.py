"""One-shot N:M pruning: where the factorization starts, and what it is compared with.

Each is a plain function from a weight to a pruned weight of the same shape, dtype and device.
"""

from armorfact.initial.magnitude import magnitude
from armorfact.initial.nowag import nowag
from armorfact.initial.sparsegpt import sparsegpt
from armorfact.initial.wanda import wanda

__all__ = ["magnitude", "nowag", "sparsegpt", "wanda"]
