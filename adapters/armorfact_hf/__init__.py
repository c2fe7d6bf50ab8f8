"""Everything of armorfact that knows Hugging Face: models, calibration, checkpoints, evaluation.

    from armorfact_hf import PruneConfig, evaluate_perplexity, load_pruned, prune_

Importing it lets transformers' own `from_pretrained` load pruned models. What is imported from here is loaded from its
own module on first use, so that a command that needs no model stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from armorfact_hf.checkpoint.registration import register

register()

if TYPE_CHECKING:
    from armorfact_hf.bench.layers import bench_folder as bench_folder
    from armorfact_hf.bench.layers import time_layers as time_layers
    from armorfact_hf.bench.models import end_to_end as end_to_end
    from armorfact_hf.checkpoint.dense import to_dense_ as to_dense_
    from armorfact_hf.checkpoint.description import NotPruned as NotPruned
    from armorfact_hf.checkpoint.folder import load_pruned as load_pruned
    from armorfact_hf.checkpoint.verify import verify_folder as verify_folder
    from armorfact_hf.data.calibration import Calibration as Calibration
    from armorfact_hf.data.load_model import load_model as load_model
    from armorfact_hf.data.own_text import write_text as write_text
    from armorfact_hf.data.tokens import tokenize as tokenize
    from armorfact_hf.data.tokens import windows as windows
    from armorfact_hf.evaluation.measure import Evaluation as Evaluation
    from armorfact_hf.evaluation.perplexity import Perplexity as Perplexity
    from armorfact_hf.evaluation.perplexity import evaluate_perplexity as evaluate_perplexity
    from armorfact_hf.evaluation.tasks import evaluate_tasks as evaluate_tasks
    from armorfact_hf.layers.execution import Execution as Execution
    from armorfact_hf.layers.linear import FactorizedLinear as FactorizedLinear
    from armorfact_hf.model.nonfinite import NonFiniteActivations as NonFiniteActivations
    from armorfact_hf.observer import Observer as Observer
    from armorfact_hf.observer import Step as Step
    from armorfact_hf.pruning.config import PruneConfig as PruneConfig
    from armorfact_hf.pruning.plan import Plan as Plan
    from armorfact_hf.pruning.plan import make_plan as make_plan
    from armorfact_hf.pruning.prune import PruneReport as PruneReport
    from armorfact_hf.pruning.prune import prune_ as prune_
    from armorfact_hf.pruning.resume.manifest import DifferentRun as DifferentRun
    from armorfact_hf.recovery.recover import recover_ as recover_
    from armorfact_hf.recovery.report import Recovery as Recovery
    from armorfact_hf.recovery.settings import RecoverySettings as RecoverySettings
    from armorfact_hf.recovery.stored_teacher import StoredTeacher as StoredTeacher
    from armorfact_hf.recovery.stored_teacher import store_teacher as store_teacher
    from armorfact_hf.recovery.trainable import train_factors_ as train_factors_
    from armorfact_hf.runs.compare import compare as compare
    from armorfact_hf.runs.evaluate import evaluate_folder as evaluate_folder
    from armorfact_hf.runs.export import export_dense as export_dense
    from armorfact_hf.runs.inspect import inspect_folder as inspect_folder
    from armorfact_hf.runs.prune_to_folder import prune_to_folder as prune_to_folder
    from armorfact_hf.runs.push import push_to_hub as push_to_hub
    from armorfact_hf.runs.recover import recover_to_folder as recover_to_folder
    from armorfact_hf.runs.save import save_pruned as save_pruned
    from armorfact_hf.runs.teach import teach_to_folder as teach_to_folder
    from armorfact_hf.runs.write import write_to_file as write_to_file

# Where each name is defined; the imports above say the same to type checkers (tests compare the two).
_HOMES = {
    "Calibration": "data.calibration",
    "DifferentRun": "pruning.resume.manifest",
    "Evaluation": "evaluation.measure",
    "Execution": "layers.execution",
    "FactorizedLinear": "layers.linear",
    "NonFiniteActivations": "model.nonfinite",
    "NotPruned": "checkpoint.description",
    "Observer": "observer",
    "Perplexity": "evaluation.perplexity",
    "Plan": "pruning.plan",
    "PruneConfig": "pruning.config",
    "PruneReport": "pruning.prune",
    "Recovery": "recovery.report",
    "RecoverySettings": "recovery.settings",
    "Step": "observer",
    "StoredTeacher": "recovery.stored_teacher",
    "bench_folder": "bench.layers",
    "compare": "runs.compare",
    "end_to_end": "bench.models",
    "evaluate_folder": "runs.evaluate",
    "evaluate_perplexity": "evaluation.perplexity",
    "evaluate_tasks": "evaluation.tasks",
    "export_dense": "runs.export",
    "inspect_folder": "runs.inspect",
    "load_model": "data.load_model",
    "load_pruned": "checkpoint.folder",
    "make_plan": "pruning.plan",
    "prune_": "pruning.prune",
    "prune_to_folder": "runs.prune_to_folder",
    "push_to_hub": "runs.push",
    "recover_": "recovery.recover",
    "recover_to_folder": "runs.recover",
    "save_pruned": "runs.save",
    "store_teacher": "recovery.stored_teacher",
    "teach_to_folder": "runs.teach",
    "time_layers": "bench.layers",
    "to_dense_": "checkpoint.dense",
    "tokenize": "data.tokens",
    "train_factors_": "recovery.trainable",
    "verify_folder": "checkpoint.verify",
    "write_text": "data.own_text",
    "write_to_file": "runs.write",
    "windows": "data.tokens",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
