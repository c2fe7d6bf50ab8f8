"""From the name of a model to a finished folder: the checkpoint and the report of what was done."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import armorfact
from armorfact_hf.checkpoint.folder import save_pruned
from armorfact_hf.data.load_model import DEMO, Loaded, Log, load_model
from armorfact_hf.data.texts import calibration_source, tokens_of
from armorfact_hf.data.tokens import spread, windows
from armorfact_hf.files import check_room
from armorfact_hf.pruning.block_by_block import Step
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.journal import DifferentRun, check_same, flat_manifest, model_fingerprint, tokens_fingerprint
from armorfact_hf.pruning.plan import Plan, make_plan
from armorfact_hf.pruning.prune import PruneReport, prune_, refuse_pruned
from armorfact_hf.report.record import FILE, CalibrationFacts, ModelFacts, Report, Totals


@dataclass(frozen=True)
class Calibration:
    """Which tokens statistics are gathered from.

    Args:
        text: a file of plain text, or "demo:gensim-enwiki".
        windows: how many, spread evenly over the text, or None for all of it; length: tokens of each.
    """

    text: str = "demo:gensim-enwiki"
    windows: int | None = 16
    length: int = 2048

    def tokens(self, loaded: Loaded, log: Log) -> torch.Tensor:
        """(windows, length) int64; a bos heads every window if the tokenizer puts it before texts.

        Raises:
            ValueError: too few tokens, or no text.
        """
        tokens = tokens_of(calibration_source(self.text, log), loaded)
        length = loaded.window(self.length)
        windows(tokens, length, self.windows, bos=loaded.bos)  # raises if there are too few tokens
        every = windows(tokens, length, bos=loaded.bos)
        return torch.from_numpy(np.stack(spread(every, self.windows)))


def prune_to_folder(
    model: str | Loaded,
    out: Path,
    config: PruneConfig | None = None,
    calibration: Calibration | None = None,
    *,
    progress: Callable[[Step], object] | None = None,
    log: Log = print,
    on_plan: Callable[[Plan], object] | None = None,
    select: Any = None,
) -> Report:
    """Prune a model and write the finished folder: checkpoint, tokenizer, `report.json`, `report.html`.

    Finished blocks stand in the folder ``<out>.journal`` until ``out`` is whole, so the same call continues a run that
    was killed; where ``out`` is the finished work of the same call, its report is returned at once.

    Args:
        model: a name for `load_model`, or a loaded dense model, which is pruned in place.
        out: the folder to write.
        config, calibration: what to prune and how, and on which tokens.
        progress: see `prune_`. log: called with a sentence for each slow step. on_plan: called with the plan.
        select: see `prune_`.

    Returns:
        The report, which is in the folder too.

    Raises:
        ValueError, OSError: bad arguments, too little room on disk, an ``out`` that holds something else; all found
            before the work starts.
    """
    config, calibration = config or PruneConfig(), calibration or Calibration()
    if out.exists() and not (out / FILE).exists():
        raise DifferentRun(f"{out} exists and is no folder that armorfact finished: name another, or remove it")
    loaded = load_model(model, log=log) if isinstance(model, str) else model
    refuse_pruned(loaded.model)
    tokens = calibration.tokens(loaded, log)
    manifest = _manifest(loaded, config, tokens)
    journal = out.with_name(f"{out.name}.journal")
    if out.exists():
        report = Report.read(out)
        check_same(report.manifest, manifest, out)
        if (journal / "manifest.json").exists():
            shutil.rmtree(journal)
        log(f"{out} is finished already.")
        return report
    plan = make_plan(loaded.model, tokens, config, measure=on_plan is not None, select=select)
    if on_plan is not None:
        on_plan(plan)
    check_room(out, 2 * plan.bytes + plan.model_bytes - plan.dense_bytes)
    facts = _model_facts(loaded, manifest["model"])
    done = prune_(loaded.model, tokens, config, select=select, journal=journal, progress=progress)
    report = _report(facts, calibration, tokens, done, plan, manifest)
    draft = journal / "whole"  # in the journal, so that whatever a kill leaves behind is removed with it
    shutil.rmtree(draft, ignore_errors=True)
    save_pruned(loaded.model, draft, loaded.tokenizer)
    report.write(draft)
    draft.rename(out)
    shutil.rmtree(journal)
    return report


def _manifest(loaded: Loaded, config: PruneConfig, tokens: torch.Tensor) -> dict[str, Any]:
    return flat_manifest(
        config.to_dict(),
        armorfact=armorfact.__version__,
        model=model_fingerprint(loaded.model),
        calibration=tokens_fingerprint(tokens),
    )


def _model_facts(loaded: Loaded, fingerprint: str) -> ModelFacts:
    parameters = list(loaded.model.parameters())
    return ModelFacts(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.nbytes for parameter in parameters),
        fingerprint=fingerprint,
    )


def _report(
    facts: ModelFacts,
    calibration: Calibration,
    tokens: torch.Tensor,
    done: PruneReport,
    plan: Plan,
    manifest: dict[str, Any],
) -> Report:
    return Report(
        armorfact_version=armorfact.__version__,
        model=facts,
        calibration=CalibrationFacts(calibration.text.removeprefix(DEMO), *tokens.shape, manifest["calibration"]),
        config=done.config,
        manifest=manifest,
        layers=done.layers,
        dense_layers=done.dense_layers,
        totals=Totals(plan.dense_bytes, plan.bytes, plan.wrapper_overhead, done.seconds, peak_memory()),
    )


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there counts what the process was forked from
        [line] = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
