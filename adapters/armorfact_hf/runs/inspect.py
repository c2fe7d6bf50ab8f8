"""What a pruned folder holds, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.checkpoint.verify import verify_folder
from armorfact_hf.layers.format import INTEGER_DTYPES, LayerFormat
from armorfact_hf.report.record import FILE, Report


@dataclass(frozen=True)
class HeldLayer:
    """A pruned layer as it lies on disk.

    Args:
        name, shape, block: which layer, or stack of experts' layers; block is None for a core alone.
        experts: how many layers are in the stack, or None.
        core_dtype, wrapper_dtype: of kept values and of blocks that are integers, or None.
        bytes: of its tensors. dense_bytes: of the weight they stand for, in the same dtype.
        theory: bytes of core and wrappers by the formula of docs/format.md.
        loss, sparsegpt_loss: relative losses in the report, this one's and SparseGPT's; None where it has none, and
            the former where the factors were recovered since. That of a stack is the mean.
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] | None
    experts: int | None
    core_dtype: str | None
    wrapper_dtype: str | None
    bytes: int
    dense_bytes: int
    theory: tuple[float, float]
    loss: float | None
    sparsegpt_loss: float | None


def inspect_folder(folder: Path | str) -> list[HeldLayer]:
    """Every pruned layer of a folder, in the order of the model, after all its files were found whole.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: whatever `armorfact_hf.checkpoint.verify.verify_folder` finds wrong.
    """
    folder = Path(folder)
    description = describe_folder(folder)
    held = verify_folder(folder, description)
    report = Report.read(folder) if (folder / FILE).exists() else None
    losses = {} if report is None else {layer.name: layer.losses for layer in report.layers}
    method = "" if report is None or report.recovery is not None else report.config.method
    return [
        HeldLayer(
            name=layer.name,
            shape=layer.shape,
            block=layer.block,
            experts=layer.experts,
            core_dtype=layer.core_dtype,
            wrapper_dtype=layer.wrapper_dtype,
            bytes=held.bytes[layer.name],
            dense_bytes=(layer.experts or 1) * layer.shape[0] * layer.shape[1] * held.dtypes[layer.name].itemsize,
            theory=_theory(layer, held.dtypes[layer.name]),
            loss=_mean_loss(layer, losses, method),
            sparsegpt_loss=_mean_loss(layer, losses, "sparsegpt"),
        )
        for layer in description.modules.values()
    ]


def _theory(layer: LayerFormat, dtype: torch.dtype) -> tuple[float, float]:
    """N / M of the weight, at its own size and some bits for its position; and the blocks, with their scales."""
    (d_out, d_in), pattern = layer.shape, layer.pattern
    value, entry = (INTEGER_DTYPES.get(name or "", dtype) for name in (layer.core_dtype, layer.wrapper_dtype))
    core = d_out * d_in * pattern.keep / pattern.group * (value.itemsize + pattern.index_bits / 8)
    (b_out, b_in), count = layer.block or (0, 0), layer.experts or 1
    scales = 0 if layer.wrapper_dtype is None else 2 * dtype.itemsize * (d_out + d_in)
    return count * core, count * (entry.itemsize * (b_out * d_out + b_in * d_in) + scales)


def _mean_loss(layer: LayerFormat, losses: dict[str, dict[str, float]], method: str) -> float | None:
    found = [losses[name][method] for name in layer.members if method in losses.get(name, {})]
    return sum(found) / len(found) if found else None
