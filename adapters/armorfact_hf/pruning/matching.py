r"""Block matching: tune a pruned decoder block until it computes what the dense model computes there.

After a block's layers are factorized one by one, their A, B and kept values of C are trained together, supports fixed:

.. math:: \min\; \operatorname{mean}_t \; \|f(h_t) - y_t\|^2 / \|y_t\|^2

where f is the pruned block, h_t a token's state as the pruned model hands it to the block, and y_t what the dense model
makes of that token there. The target is the whole block's, so that one layer may make good what another lost, and what
earlier blocks lost; relative, since a norm follows in every model and a few tokens with huge states would own a plain
sum. (Aiming each *layer* at the dense output instead is a regression on noisy inputs: it shrinks, and shrinkage
compounds; see docs/results.md.)

Some windows are kept aside. If the error on them does not fall, measured with the factors as they are stored, the block
keeps those it had.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from armorfact import BlockDiagonal, Core, Factors
from armorfact.gauge import canonical
from armorfact_hf.layers.linear import FactorizedLinear

KEPT_ASIDE = 8  # one window in so many
WARM_UP = 5  # steps over which the rate rises; then it falls as a cosine, to LEAST of itself
LEAST = 0.1
BETAS = (0.9, 0.95)
MOST_HALVINGS = 8

Layers = Mapping[str, FactorizedLinear]


@dataclass(frozen=True)
class Matching:
    """How a block is tuned.

    Args:
        passes: over the windows that are not kept aside.
        rate: the learning rate of the kept values of C; that of A and B is ``wrapper_rate`` times as large.
    """

    passes: int
    rate: float
    wrapper_rate: float

    def steps(self, windows: int) -> int:
        """How many windows are run in all, those kept aside (before and after) included."""
        aside = len(kept_aside(windows))
        return self.passes * (windows - aside) + 2 * aside if aside else 0


@dataclass(frozen=True)
class BlockReport:
    """What matching did to a decoder block.

    Args:
        decoder_block: its index.
        before, after: mean of ||f(h) - y||^2 / ||y||^2 over the tokens kept aside, with the layers as factorized and as
            tuned, in the dtype in which they are stored.
        kept: whether the tuned factors are what is stored.
        notes: what went wrong on the way.
    """

    decoder_block: int
    before: float
    after: float
    kept: bool
    notes: tuple[str, ...] = ()


def kept_aside(windows: int) -> range:
    """The windows that measure and do not train: one in eight, at least one of two."""
    return range(min(KEPT_ASIDE, windows) - 1, windows, KEPT_ASIDE) if windows > 1 else range(0)


def match_block_(
    model: nn.Module,
    layers: Layers,
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    matching: Matching,
    decoder_block: int,
) -> tuple[dict[str, FactorizedLinear], BlockReport]:
    """Tune the pruned layers of one decoder block, in place in the model.

    Args:
        model: holds the layers under their names; no parameter of it asks for gradients.
        layers: the pruned layers of the block by name, with wrappers or without.
        run: what the block makes of a window by its number, (1, length, width), with gradients where they are enabled.
        targets: y for each window, (1, length, width).
        matching: the settings. decoder_block: the index of the block, which seeds the order of the windows.

    Returns:
        The layers that the model holds now, in the dtype of those given, and the report.
    """
    aside = kept_aside(len(targets))
    before = _error(run, targets, aside)
    masters = {name: _master(layer) for name, layer in layers.items()}
    _put(model, masters)
    notes = _train(masters, run, targets, matching, decoder_block)
    tuned = {name: _stored(masters[name], layer) for name, layer in layers.items()}
    _put(model, tuned)
    after = _error(run, targets, aside)
    kept = after < before and len(notes) <= MOST_HALVINGS  # NaN is not smaller
    if not kept:
        _put(model, layers)
    return dict(tuned if kept else layers), BlockReport(decoder_block, before, after, kept, tuple(notes))


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of ||output - target||^2 / ||target||^2, a scalar float32."""
    output, target = output.float(), target.float()
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output - target).square().sum(-1) / energy).mean()


@torch.no_grad()
def _error(run: Callable[[int], Tensor], targets: Sequence[Tensor], windows: Iterable[int]) -> float:
    errors = [float(relative_error(run(window), targets[window])) for window in windows]
    return sum(errors) / len(errors)


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def _master(layer: FactorizedLinear) -> FactorizedLinear:
    """The layer in float32, its factors (and bias) ready to be trained."""
    master = copy.deepcopy(layer).float().use_(None)
    return master.requires_grad_(True)


@torch.no_grad()
def _stored(master: FactorizedLinear, like: FactorizedLinear) -> FactorizedLinear:
    """The trained layer in the canonical gauge, rounded to the dtype that it is stored in."""
    left, core, right, bias = master.left, master.core, master.right, master.bias
    dtype = like.values.dtype
    if left is not None and right is not None:
        found = canonical(Factors(left.detach(), core.dense(), right.detach())).astype(dtype)
        factors = Core.from_dense(found.core, core.pattern), BlockDiagonal(found.left), BlockDiagonal(found.right)
    else:
        factors = Core(core.values.to(dtype), core.packed, core.pattern, core.columns), None, None
    return FactorizedLinear.of(*factors, None if bias is None else bias.detach().to(dtype))


@dataclass
class _Rate:
    """Warm-up, then a cosine; halved whenever a step had to be undone."""

    total: int
    factor: float = 1.0

    def at(self, step: int) -> float:
        """The multiple of the base rate for a step."""
        rising = min(1.0, (step + 1) / WARM_UP)
        return self.factor * rising * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / self.total)) / 2)


@dataclass
class _Undo:
    """The parameters as they were before the last step."""

    parameters: list[nn.Parameter]
    kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def remember(self) -> None:
        """Keep them as they are now."""
        self.kept = [parameter.clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was kept, if anything was."""
        for parameter, value in zip(self.parameters, self.kept, strict=False):
            parameter.copy_(value)


def _train(
    masters: Layers, run: Callable[[int], Tensor], targets: Sequence[Tensor], matching: Matching, seed: int
) -> list[str]:
    """AdamW over the windows, one a step, in an order drawn from the seed; the notes of what had to be undone."""
    groups = _groups(masters.values(), matching)
    parameters = [parameter for group in groups for parameter in group["params"]]
    order = _order(len(targets), matching.passes, seed)
    rate, undo, notes = _Rate(len(order)), _Undo(parameters), []
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    bases = [group["lr"] for group in groups]
    for step, window in enumerate(order):
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * rate.at(step)
        if _backward(run, window, targets[window], parameters):
            undo.remember()
            optimizer.step()
        else:
            undo.restore()
            optimizer.state.clear()
            rate.factor /= 2
            notes.append(f"step {step + 1} of matching was not finite: the one before was undone, and the rate halved")
        optimizer.zero_grad(set_to_none=True)
        if len(notes) > MOST_HALVINGS:
            break
    return notes


def _groups(masters: Iterable[FactorizedLinear], matching: Matching) -> list[dict]:
    masters = list(masters)
    core = [tensor for master in masters for tensor in (master.values, master.bias) if tensor is not None]
    wrappers = [tensor for master in masters for tensor in (master.left, master.right) if tensor is not None]
    groups = [{"params": core, "lr": matching.rate}]
    return [*groups, {"params": wrappers, "lr": matching.rate * matching.wrapper_rate}] if wrappers else groups


def _order(windows: int, passes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    training = [window for window in range(windows) if window not in kept_aside(windows)]
    return [training[k] for _ in range(passes) for k in torch.randperm(len(training), generator=generator).tolist()]


def _backward(run: Callable[[int], Tensor], window: int, target: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Gradients of the error on one window; whether all of them are finite."""
    with torch.enable_grad(), torch.autocast(target.device.type, torch.bfloat16):
        output = run(window)
    loss = relative_error(output, target)
    if not loss.isfinite():
        return False
    loss.backward()
    return all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in parameters)
