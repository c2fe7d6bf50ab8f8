"""What a pruned folder holds, and how to get an ordinary dense one out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from armorfact_hf import sources
from armorfact_hf.checkpoint import describe_folder, stored_tensors, to_dense_
from armorfact_hf.files import check_room, written_whole
from armorfact_hf.workflow import read_report


@dataclass(frozen=True)
class HeldLayer:
    """A pruned layer as it lies on disk.

    Args:
        name, shape, block: which layer; block is None for a core alone.
        bytes: of its tensors. dense_bytes: of the weight they stand for, in the same dtype.
        loss, sparsegpt_loss: relative losses in the report, this one's and SparseGPT's; None where it has none.
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] | None
    bytes: int
    dense_bytes: int
    loss: float | None
    sparsegpt_loss: float | None


def inspect_folder(folder: Path) -> list[HeldLayer]:
    """Every pruned layer of a folder, in the order of the model.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: a damaged or missing file, or a layer without its tensors.
    """
    _, description = describe_folder(folder)
    sizes: dict[str, int] = {}
    width: dict[str, int] = {}
    for name, tensor in stored_tensors(folder):
        layer, _, part = name.rpartition(".")
        if layer in description.modules and part != "bias":
            sizes[layer] = sizes.get(layer, 0) + tensor.nbytes
            width[layer] = max(width.get(layer, 0), tensor.element_size())
    if missing := sorted(set(description.modules) - set(sizes)):
        raise ValueError(f"{folder} lacks the tensors of {', '.join(missing[:5])}")
    losses = _losses(folder, description.config.method)
    return [
        HeldLayer(name, shape, block, sizes[name], shape[0] * shape[1] * width[name], *losses.get(name, (None, None)))
        for name, (shape, block) in description.modules.items()
    ]


def _losses(folder: Path, method: str) -> dict[str, tuple[float | None, float | None]]:
    if not (folder / "report.json").exists():
        return {}
    layers = read_report(folder)["layers"]
    return {layer["name"]: (layer["losses"].get(method), layer["losses"].get("sparsegpt")) for layer in layers}


def export_dense(folder: Path, out: Path, log: sources.Log = print) -> None:
    """Write the model of a pruned folder with dense weights A C B, as an ordinary folder for any other tool.

    Raises:
        NotPruned: the folder holds no pruned model.
        FileExistsError: ``out`` exists. OSError: too little room on disk.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new folder")
    describe_folder(folder)
    loaded = sources.load_model(str(folder), device="cpu", log=log)
    model = to_dense_(loaded.model)
    check_room(out, sum(parameter.nbytes for parameter in model.parameters()))
    with written_whole(out) as draft:
        model.save_pretrained(draft)
        loaded.tokenizer.save_pretrained(draft)
