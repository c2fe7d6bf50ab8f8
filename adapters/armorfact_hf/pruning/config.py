"""What to prune and how: one frozen record that is checked at once and saved with the model."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from armorfact import Pattern
from armorfact_hf.pruning.schedule import Matching

ONE_SHOT = ("sparsegpt", "wanda", "nowag", "magnitude")
METHODS = ("armorfact", *ONE_SHOT)
BASELINES = (*ONE_SHOT, "paper")
OBJECTIVES = ("gram", "normalized", "diagonal", "nowag")
OF_FULL_GRAM = OBJECTIVES[:2]
INTEGER_DTYPES = ("int8",)  # of cores and wrappers
AUTO, PRICED = "auto", "priced"  # how blocks are chosen
DEFAULT_SHRINKAGE = 1.0
OF_FACTORS = ("block", "objective", "shrinkage", "init", "sweeps", "rtol")  # settings of method="armorfact" alone
OF_MATCHING = ("passes", "rate", "tail")  # of refine="block" alone


@dataclass(frozen=True)
class PruneConfig:
    """How each chosen linear layer W (d_out, d_in) is replaced, given its inputs X.

    Args:
        method: "armorfact" factorizes W ~ A C B; "sparsegpt", "wanda", "nowag" and "magnitude" prune in one shot,
            without wrappers; how factors are found (block, objective, shrinkage, init, sweeps, rtol, passes, rate,
            tail) is then left at its defaults.
        pattern: "N:M", at most N non-zeros in M consecutive inputs.
        block: size of the wrappers' blocks, which has to divide d_out and d_in; "auto" takes the largest up to 128
            whose wrappers add at most an eighth to the layer, or the smallest where all add more; "priced" shares the
            same entries in all out by what each layer costs the model (`armorfact_hf.pruning.budget`).
        tensor_parallel: how many ranks of a server will share each layer: blocks are chosen that no cut goes through,
            and a layer that cannot be cut into so many parts stays dense. 1 asks nothing.
        objective: "gram" minimizes ||(W - ACB) X||^2 with the full Gram matrix H = X X'; "normalized" the same of W
            normalized by rows and columns, as NoWag does, so that outputs of small weights count as well; "diagonal"
            sees only diag(H); "nowag" sees diag(H) and the normalized W, which is the objective of the ARMOR paper.
        shrinkage: λ in H + λ diag(H), where all of H is looked at (None is 1.0): a finite sample of tokens overstates
            how far inputs are correlated.
        propagate: "pruned" takes X from the decoder blocks before this one as they are after pruning; "dense" from the
            dense model.
        target: "weight" aims at W X; "output" aims at what the dense model computes there, W X_dense, while the input
            is the pruned one (for propagate="pruned" and objective="gram").
        init: where the factorization starts, a method of one shot.
        sweeps: most sweeps of the solver over a layer.
        rtol: a layer ends after three sweeps that each lower its loss by less than this share.
        refine: "block" tunes the factors of a whole decoder block, once its layers are factorized, towards what the
            dense model computes there (`armorfact_hf.pruning.tuning.matching`); None keeps them as factorized. It is
            for the method "armorfact", and takes two windows of calibration or more: some are kept aside.
        passes: over the calibration windows while a block is tuned; four times as many for the first block.
        rate: the learning rate of its factors, as a share of the root mean square of each.
        tail: the last so many blocks are tuned once more, together, towards the words of the dense model, if the last
            of all holds pruned layers. passes, rate and tail are left at their defaults where refine is None.
        core_dtype: "int8" rounds the kept values in the end, after all tuning, and solves for the wrappers once more
            (`armorfact.quantize_core`); None keeps them in the dtype of the model. It is for the method "armorfact".
        wrapper_dtype: "int8" then rounds the wrappers as well, with a scale for each of their rows and columns
            (`armorfact.quantize_wrappers`). It takes a core in int8, and is not for experts.
        include: which linear layers of the decoder blocks: module names or their last parts ("q_proj",
            "mlp.down_proj"), or regular expressions after "re:" that match from the start of the name. Experts that
            stand in one tensor are such layers too ("experts.7.gate"), all those of a module or none ("re:.*experts").
        ignore: layers to leave dense all the same, written like ``include``.
        head: prune the output head too; a head tied to the embedding is untied.
        baselines: methods whose loss on every layer the report shows beside the chosen one; "paper" is the ARMOR
            paper's objective solved to convergence.

    Raises:
        ValueError, TypeError: an unknown name, a number out of range, a value of the wrong type.
        ValueError: a combination that contradicts itself, or a setting that would not act.
    """

    method: str = "armorfact"
    pattern: str = "2:4"
    block: int | str = AUTO
    tensor_parallel: int = 1
    objective: str = "gram"
    shrinkage: float | None = None
    propagate: str = "pruned"
    target: str = "weight"
    init: str = "sparsegpt"
    sweeps: int = 20
    rtol: float = 1e-3
    refine: str | None = "block"
    passes: int = 3
    rate: float = 0.002
    tail: int = 4
    core_dtype: str | None = None
    wrapper_dtype: str | None = None
    include: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] = ()
    head: bool = False
    baselines: tuple[str, ...] = ("sparsegpt", "wanda", "nowag")

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("propagate", self.propagate, ("pruned", "dense"))
        _one_of("target", self.target, ("weight", "output"))
        _one_of("init", self.init, ONE_SHOT)
        _one_of("refine", self.refine, ("block", None))
        _one_of("core_dtype", self.core_dtype, (*INTEGER_DTYPES, None))
        _one_of("wrapper_dtype", self.wrapper_dtype, (*INTEGER_DTYPES, None))
        Pattern.parse(self.pattern)
        self._check_numbers()
        self._check_combinations()
        for name, known in (("include", None), ("ignore", None), ("baselines", BASELINES)):
            self._set(name, _names(name, getattr(self, name), known))

    def _check_numbers(self) -> None:
        self._set("sweeps", _whole("sweeps must be a whole number", self.sweeps))
        self._set("rtol", _real("rtol", self.rtol))
        if self.block not in (AUTO, PRICED):
            rule = "block must be a positive number of channels, 'auto' or 'priced'"
            size = _whole(rule, self.block)
            if size < 1:
                raise ValueError(f"{rule}, got {self.block!r}")
            self._set("block", size)
        if self.sweeps < 0 or not 0 <= self.rtol < 1:
            raise ValueError(f"expected sweeps >= 0 and 0 <= rtol < 1, got sweeps={self.sweeps}, rtol={self.rtol}")
        self._set("tensor_parallel", _whole("tensor_parallel must be a whole number of ranks", self.tensor_parallel))
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1 rank, got {self.tensor_parallel}")
        self._set("passes", _whole("passes must be a whole number", self.passes))
        self._set("rate", _real("rate", self.rate))
        self._set("tail", _whole("tail must be a whole number of decoder blocks", self.tail))
        if self.passes < 1 or not 0 < self.rate < float("inf"):
            raise ValueError(
                f"expected passes >= 1 and a finite rate > 0, got passes={self.passes}, rate={self.rate}; "
                "refine=None leaves blocks as factorized"
            )
        if self.tail < 0:
            raise ValueError(f"tail must be a whole number of decoder blocks, 0 or more, got {self.tail}")
        if self.shrinkage is not None:
            self._set("shrinkage", _real("shrinkage", self.shrinkage))
            if not 0 <= self.shrinkage < float("inf"):
                raise ValueError(f"shrinkage must be a finite number >= 0, got {self.shrinkage}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_combinations(self) -> None:
        if self.objective not in OF_FULL_GRAM and self.shrinkage is not None:
            raise ValueError(
                f"shrinkage acts on the correlations that objective={self.objective!r} does not look at; "
                "leave it out, or take objective='gram'"
            )
        if self.core_dtype is not None and self.method != "armorfact":
            raise ValueError(
                f"core_dtype={self.core_dtype!r} needs wrappers, which hold the scales, and method={self.method!r} "
                "makes none: take method='armorfact', or leave it out"
            )
        if self.wrapper_dtype is not None and self.core_dtype is None:
            raise ValueError(
                f"wrapper_dtype={self.wrapper_dtype!r} is for wrappers around a core in int8, which makes up for their "
                "rounding: add core_dtype='int8' (--core-dtype int8), or leave it out"
            )
        if self.target == "output" and (self.objective, self.propagate) != ("gram", "pruned"):
            raise ValueError(
                "target='output' corrects for what pruning the blocks before did to the inputs: it needs "
                f"objective='gram' and propagate='pruned', got {self.objective!r} and {self.propagate!r}"
            )
        if self.method != "armorfact":
            compared = {"block"} if "paper" in self.baselines and self.block != PRICED else set()  # which has wrappers
            alone = {*OF_FACTORS, *OF_MATCHING} - compared
            self._check_untouched(alone, f"method='armorfact', got method={self.method!r}")
        elif self.refine is None:
            self._check_untouched(OF_MATCHING, "refine='block', got refine=None")

    def _check_untouched(self, names: Collection[str], needed: str) -> None:
        moved = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        moved = {name: value for name, value in moved.items() if value != getattr(PruneConfig, name)}
        if moved:
            listed = ", ".join(f"{name}={value!r}" for name, value in moved.items())
            raise ValueError(f"{listed} would not act: expected {needed}. Leave out what does not go with it")

    def in_one_shot(self, method: str) -> PruneConfig:
        """What of these settings goes with a method without wrappers, compared with no others."""
        untouched = {name: getattr(PruneConfig, name) for name in OF_FACTORS + OF_MATCHING}
        return replace(self, method=method, baselines=(), core_dtype=None, wrapper_dtype=None, **untouched)

    @property
    def diagonal_weight(self) -> float:
        """λ as a number: the default where ``shrinkage`` is None, 0 for objectives without correlations."""
        if self.objective not in OF_FULL_GRAM:
            return 0.0
        return DEFAULT_SHRINKAGE if self.shrinkage is None else self.shrinkage

    @property
    def matching(self) -> Matching | None:
        """How decoder blocks are tuned, or None where they are kept as factorized."""
        wanted = self.method == "armorfact" and self.refine == "block"
        return Matching(self.passes, self.rate) if wanted else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _one_of(name: str, value: Any, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def _whole(expected: str, value: Any) -> int:
    """A whole number of any library, as Python's."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{expected}, got {value!r}")


def _real(name: str, value: Any) -> float:
    """A number of any library, as Python's."""
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _names(name: str, value: Iterable[str], known: tuple[str, ...] | None) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(part, str) for part in value):
        raise TypeError(f"{name} must be a tuple of strings, got {value!r}")
    names = tuple(value)
    for part in names:
        if known is not None:
            _one_of(name, part, known)
        elif part.startswith("re:"):
            _compile(name, part[3:])
    return names


def _compile(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name}: {expression!r} is not a regular expression: {error}") from error
