"""The product with a 2:4 core on the sparse tensor cores of an NVIDIA GPU, for many tokens: y = x C'.

cuSPARSELt does the work, through the operators that PyTorch has for it. CUTLASS's form of 2:4, which PyTorch has too,
is not used: GPUs since Hopper refuse it. `compress` gives the one tensor that a layer keeps, `search` measures which of
cuSPARSELt's algorithms is fastest for a number of tokens, `product` multiplies.

cuSPARSELt computes C x' and takes whole multiples of a few rows. It reads only the sizes of x', never its strides: what
is not laid out as it believes gives wrong numbers without an error. So x is padded and laid out here, inside of
armorfact::factorized_linear, where `torch.compile`, which may lay a tensor out anew, does not look.

Not measured yet: everything that runs on a GPU. The tests replace the operators by stand-ins of the same contract, and
hold the rest against them on a CPU; one test, marked gpu, waits for a device. Two different GPUs in one process are
not tested at all: PyTorch keeps one cuSPARSELt handle a thread, made for the device that asked first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from armorfact import Core
from armorfact_hf.layers.strategies.strategy import PAIR, Kind

# For float32 the hardware's pattern is 1:2, which a 2:4 core breaks wherever it keeps two neighbours of a pair.
DTYPES = (torch.float16, torch.bfloat16)
# PyTorch's own rules for 16 bits: sizes of the sparse matrix, and of the dense one, are multiples of these.
CORE_MULTIPLE, TOKEN_MULTIPLE = 16, 8
OLDEST_CAPABILITY = (8, 0)
SEARCHED_TOKENS = 512
# PyTorch's first operator with split-k took a bool named split_k_one_kernel where later ones take int split_k_mode.
MODE_NAME = torch.ops.aten._cslt_sparse_mm.default._schema.arguments[-1].name

_found: dict[tuple, Algorithm] = {}


@dataclass(frozen=True)
class Compressed:
    """A 2:4 matrix as cuSPARSELt stores it, in about 9/16 of the bytes of its dense form.

    Args:
        tensor: (d_out, columns), the kept values and behind them their positions, in a layout that cuSPARSELt does not
            publish and that may differ from one GPU to another: made where it is used, and not saved.
        shape: (d_out, d_in).
    """

    tensor: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Algorithm:
    """Which of cuSPARSELt's kernels multiplies; as it stands, the one PyTorch takes unasked.

    Args:
        alg_id: number of the kernel.
        split_k: into how many parts d_in is split.
        split_k_mode: how the parts are added up.
    """

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


def refusal(kind: Kind) -> str | None:
    """Why such a core cannot run on the sparse tensor cores of its device, or None if it can.

    Where nothing else speaks against it, cuSPARSELt is asked to compress a small matrix: it may be older than the GPU.
    """
    return _core_refusal(kind) or _device_refusal(kind.device)


def _core_refusal(kind: Kind) -> str | None:
    (d_out, d_in), dtype = kind.shape, kind.dtype
    if kind.pattern != PAIR:
        return f"sparse tensor cores multiply with 2:4 cores, got {kind.pattern}"
    if kind.stored != dtype:
        return f"the copy for sparse tensor cores is in the dtype of the layer, got a core in {kind.stored}"
    if dtype == torch.float32:
        return "in float32 the pattern of sparse tensor cores is 1:2, not 2:4: use float16 or bfloat16"
    if dtype not in DTYPES:
        return f"expected float16 or bfloat16 for sparse tensor cores, got {dtype}"
    if min(d_out, d_in) < CORE_MULTIPLE or d_out % CORE_MULTIPLE or d_in % CORE_MULTIPLE:
        return f"cuSPARSELt needs sizes that are multiples of {CORE_MULTIPLE}, got {d_out} x {d_in}"
    return None


def _device_refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"sparse tensor cores are in CUDA devices, got {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return "2:4 products are written for NVIDIA GPUs, and this PyTorch is built for AMD's"
    if not torch.backends.cusparselt.is_available():
        return "this PyTorch is built without cuSPARSELt"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"sparse tensor cores came with compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return _library_refusal(device)


def _library_refusal(device: torch.device) -> str | None:
    try:
        torch._cslt_compress(torch.zeros(64, 64, dtype=torch.float16, device=device))
    except RuntimeError as error:
        return f"cuSPARSELt does not run on this GPU: {str(error).splitlines()[0]}"
    return None


def compress(core: Core) -> Compressed:
    """The 2:4 core (d_out, d_in), float16 or bfloat16, on a CUDA device, in cuSPARSELt's form on that device.

    The dense form and what makes it exist meanwhile, several times 2 d_out d_in bytes.

    Raises:
        ValueError: `refusal` says why the device cannot do it.
    """
    reason = refusal(Kind(core.shape, core.pattern, core.values.dtype, core.values.device))
    if reason is not None:
        raise ValueError(reason)
    d_out, d_in = core.shape
    # Older releases of PyTorch give one long row, newer ones d_out of them.
    tensor = torch._cslt_compress(core.dense().detach().contiguous()).view(d_out, -1)
    return Compressed(tensor, (d_out, d_in))


def search(compressed: Compressed, tokens: int) -> Algorithm:
    """The fastest algorithm for inputs of so many tokens, found by running every one on random inputs.

    It takes long beside a product and waits for the device: search once for a range of tokens, outside of any graph.

    Raises:
        ValueError: less than one token.
    """
    if tokens < 1:
        raise ValueError(f"an algorithm is searched for one token or more, got {tokens}")
    tensor, d_in = compressed.tensor, compressed.shape[1]
    own = torch.Generator(tensor.device).manual_seed(0)  # leaves the user's random numbers as they are
    x = torch.randn(tokens, d_in, dtype=tensor.dtype, device=tensor.device, generator=own)
    # The operator that searches is deprecated, and returns alg_id alone. What replaces it does not, as operators do,
    # switch to the device of its tensors.
    with torch.cuda.device_of(tensor):
        found = torch._C._cusparselt.mm_search(tensor, padded(x).t(), None, None, None, True)
    alg_id, split_k, split_k_mode, *_ = found
    return Algorithm(int(alg_id), int(split_k), int(split_k_mode))


def found_algorithm(compressed: Compressed) -> Algorithm:
    """`search` at 512 tokens, once for all layers of a shape on a device."""
    key = (compressed.shape, compressed.tensor.dtype, compressed.tensor.device)
    if key not in _found:
        _found[key] = search(compressed, SEARCHED_TOKENS)
    return _found[key]


def product(compressed: Compressed, x: Tensor, algorithm: Algorithm) -> Tensor:
    """y = x C', (T, d_out), for x (T, d_in) of the dtype and on the device of the core; any T, any strides.

    PyTorch asks for sums in float32 (before cuSPARSELt 0.5.2, as with CUDA 11.8, in 16 bits). No gradients.

    Raises:
        ValueError: x has another width or another dtype.
    """
    tensor, d_in = compressed.tensor, compressed.shape[1]
    # cuSPARSELt would read past the end of a narrower x.
    if x.ndim != 2 or x.shape[1] != d_in or x.dtype != tensor.dtype:
        raise ValueError(f"expected an input (tokens, {d_in}) of {tensor.dtype}, got {tuple(x.shape)} of {x.dtype}")
    tokens = x.shape[0]
    if not tokens:
        return x.new_empty(0, tensor.shape[0])
    # The transpose of rows in memory is what the operator takes for "transposed"; with at least 8 of them it cannot
    # be mistaken. transpose_result has cuSPARSELt write y row by row as well.
    options = {"alg_id": algorithm.alg_id, "split_k": algorithm.split_k} | _mode(MODE_NAME, algorithm.split_k_mode)
    return torch._cslt_sparse_mm(tensor, padded(x).t(), transpose_result=True, **options)[:tokens]


def padded(x: Tensor) -> Tensor:
    """x (T, d_in) with rows of zeros up to a multiple of 8, row after row in memory; x itself if it is so."""
    missing = -x.shape[0] % TOKEN_MULTIPLE
    return (functional.pad(x, (0, 0, 0, missing)) if missing else x).contiguous()


def _mode(name: str, split_k_mode: int) -> dict[str, int | bool]:
    return {name: bool(split_k_mode) if name == "split_k_one_kernel" else split_k_mode}
