"""The divergence and its gradient, a few positions at a time, are those of the logits as a whole."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from armorfact_hf.model import token_divergence as module
from armorfact_hf.model.token_divergence import BodyAndHead
from armorfact_hf.recovery.divergence import Divergence
from tests.hf.models import VOCABULARY, random_tokens
from tests.hf.recovery.models import dense_model, pruned_layers, pruned_model

WINDOW = random_tokens(1, seed=5)[0]
FAMILIES = ["llama", "gemma3", "gpt2", "falcon"]


@pytest.fixture(autouse=True)
def _few_positions(monkeypatch):
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", 7)  # does not divide the window
    monkeypatch.setattr(module, "LOGARITHMS_AT_ONCE", 3 * VOCABULARY)  # which does not divide that


def naive(student: nn.Module, teacher: nn.Module, window: Tensor) -> Tensor:
    """Mean over positions of the sum over words of p log(p / q), as it is written."""
    p, q = (model(window[None]).logits[0].softmax(-1) for model in (teacher, student))
    return (p.detach() * (p.detach() / q).log()).sum(-1).mean()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """All floating tensors of the pruned layers, asking for gradients; nothing else asks."""
    model.requires_grad_(False)
    found = {
        f"{name}.{part}": tensor
        for name, layer in pruned_layers(model).items()
        for part, tensor in layer.named_parameters()
    }
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_is_that_of_whole_logits(family):
    student, teacher = pruned_model(family, torch.float64), dense_model(family, torch.float64)
    found = Divergence(student, teacher).of(WINDOW)
    assert found == pytest.approx(float(naive(student, teacher, WINDOW).detach()), rel=1e-9) and found > 0.01


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_those_of_whole_logits(family, again):
    student, teacher = pruned_model(family, torch.float64), dense_model(family, torch.float64)
    parameters = trained(student)
    wanted = torch.autograd.grad(naive(student, teacher, WINDOW), list(parameters.values()))
    value = Divergence(student, teacher, gradient_checkpointing=again).backward(WINDOW)
    assert value == pytest.approx(Divergence(student, teacher).of(WINDOW), rel=1e-9)
    for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10, msg=name)
        assert gradient.abs().max() > 0, name


def test_a_pruned_head_gets_its_gradients_too():
    student, teacher = pruned_model(dtype=torch.float64, head=True), dense_model(dtype=torch.float64)
    head = [tensor for name, tensor in trained(student).items() if name.startswith("lm_head")]
    wanted = torch.autograd.grad(naive(student, teacher, WINDOW), head)
    Divergence(student, teacher).backward(WINDOW)
    for tensor, gradient in zip(head, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_bfloat16_come_close(dtype):
    student, teacher = pruned_model(), dense_model(dtype=dtype)
    parameters = trained(student)
    wanted = torch.autograd.grad(naive(student, dense_model(), WINDOW), list(parameters.values()))
    Divergence(student, teacher).backward(WINDOW)
    errors, sizes = zip(
        *[
            ((parameter.grad - gradient).norm(), gradient.norm())
            for parameter, gradient in zip(parameters.values(), wanted, strict=True)
        ],
        strict=True,
    )
    assert torch.stack(errors).norm() < 0.1 * torch.stack(sizes).norm()


def test_logits_of_a_few_positions_stand_in_memory_at_a_time(monkeypatch):
    student, teacher = pruned_model(), dense_model()
    trained(student)
    sizes = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
    Divergence(student, teacher).backward(WINDOW)
    assert len(sizes) > 6 and max(sizes) <= 7 * VOCABULARY


def test_blocks_that_are_computed_again_keep_less(monkeypatch):
    kept = []

    def held(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    sums = []
    for again in (False, True):
        student, teacher = pruned_model(), dense_model()
        trained(student)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(held, lambda tensor: tensor):
            Divergence(student, teacher, again).states_with_gradients(WINDOW)
        sums.append(sum(kept))
    assert sums[1] < 0.2 * sums[0]


def test_a_model_that_cuts_gradients_off_is_told():
    student = pruned_model()
    trained(student)
    student.transformer.ln_f.register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(ValueError, match="no gradient reaches the pruned layers"):
        Divergence(student, dense_model()).backward(WINDOW)


def test_a_head_that_cuts_gradients_off_is_told():
    student = pruned_model()
    trained(student)
    student.lm_head.register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(ValueError, match="no gradient comes through the model's head"):
        Divergence(student, dense_model()).backward(WINDOW)


class Products(TorchDispatchMode):
    """Counts the operations called inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [1, 3])
def test_a_part_of_the_states_meets_the_head_in_one_product(every):
    """As a batch of one it would be multiplied by a copy of the head's weight, made anew each time."""
    parts = BodyAndHead(dense_model().requires_grad_(False))
    states = parts.states(WINDOW)
    with Products() as products, torch.no_grad():
        found = parts.logits(WINDOW[:6:every], states[:, :6:every]).values
    assert not products.seen["aten.bmm.default"] and products.seen["aten.mm.default"] == 1
    torch.testing.assert_close(found, parts.logits(WINDOW, states).values[:6:every])
