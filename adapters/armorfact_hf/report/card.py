"""The model card of a pruned folder: the README.md that tells a stranger what it holds and how to run it.

It is made of `config.json`, the files' sizes and, where there is one, the report; nothing is measured for it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.checkpoint.shards import shards
from armorfact_hf.data.origin import CARD, Origin
from armorfact_hf.files import written_beside
from armorfact_hf.report.record import FILE, PerplexityRecord, Report

SEAL = re.compile(r"\n<!-- written by armorfact, ([0-9a-f]{64}) -->\n\Z")


def write_card(folder: Path) -> bool:
    """Write README.md into a pruned folder, from its config and its report; a card that somebody edited is left alone.

    Returns:
        Whether it was written.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: config.json, the report or the index of the files is damaged.
    """
    text = _card(folder).content
    if (folder / CARD).exists() and not _is_ours(folder / CARD):
        return False
    sealed = f"{text.rstrip()}\n"
    sealed += f"\n<!-- written by armorfact, {_digest(sealed)} -->\n"
    with written_beside(folder / CARD) as draft:
        draft.write_text(sealed, encoding="utf-8")
    return True


def _is_ours(path: Path) -> bool:
    """Whether the card is as `write_card` left it: its last line holds the digest of what stands above."""
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    found = SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _card(folder: Path) -> ModelCard:
    description = describe_folder(folder)
    report = Report.read(folder) if (folder / FILE).exists() else None
    text = _TEMPLATES.get_template("card.md.j2").render(
        title=_title(folder, report),
        description=description,
        layers=sum(len(layer.members) for layer in description.modules.values()),
        wrapped=any(layer.block for layer in description.modules.values()),
        report=report,
        perplexities=[] if report is None else _perplexities(report),
        tasks=[] if report is None else [task for task in report.tasks if task.pruned is not None],
        calibration="" if report is None else Path(report.calibration.text).name,
        bytes=sum(path.stat().st_size for path in shards(folder)),
        settings=", ".join(f"{name} {_setting(value)}" for name, value in description.prune.items()),
    )
    # A name in the report may hold half a character, which no file can.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return ModelCard(f"---\n{_metadata(folder, description, report).to_yaml()}\n---\n\n{text}")


def _metadata(folder: Path, description: Description, report: Report | None) -> ModelCardData:
    """What the hub reads of a card."""
    origin = Origin() if report is None else report.model.origin
    results = [] if report is None else [_result(record, value) for record, value in _perplexities(report)]
    return ModelCardData(
        base_model=origin.hub_name,
        base_model_relation="quantized" if origin.hub_name else None,  # what the hub calls any compression
        license=origin.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["armorfact", "sparse", "pruned", f"{description.pattern}-sparsity".replace(":", "-")],
        model_name=_title(folder, report) if results else None,
        eval_results=results or None,
    )


def _result(record: PerplexityRecord, perplexity: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=_one_line(record.text),
        dataset_name=_one_line(record.text),
        dataset_split=_one_line(record.split),
        metric_type="perplexity",
        metric_value=perplexity,
        metric_args={"window": record.window, "stride": record.stride, "tokens": record.tokens},
    )


def _title(folder: Path, report: Report | None) -> str:
    """The base model's name, without what only its owner or this machine calls it by."""
    known = folder.name if report is None else report.model.origin.hub_name or report.model.name
    return _one_line(Path(known).name)


def _perplexities(report: Report) -> list[tuple[PerplexityRecord, float]]:
    """The records of texts that this folder was measured on, with its own perplexity there."""
    own = report.config.method
    return [(record, x.perplexity) for record in report.evaluations for x in record.methods if x.name == own]


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())


def _cell(text: object) -> str:
    """Text that stays in its cell, and text, whatever is in it."""
    return re.sub(r"([\\`*_<>|\[\]{}])", r"\\\1", _one_line(str(text)))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["cell"] = _cell
