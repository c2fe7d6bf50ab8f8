"""Experts in a pruning run: rare ones, reports, the plan, and a run that is killed and resumed."""

from __future__ import annotations

import hashlib

import pytest
import torch

from armorfact_hf.model.moments import Inputs, Statistics
from armorfact_hf.model.structure import Layer, chosen_layers
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.experts import BORROWED, pool_
from armorfact_hf.pruning.losses import energy
from armorfact_hf.pruning.plan import make_plan
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers import in_process
from tests.hf.models import BLOCKS, EXPERTS, VOCABULARY, random_tokens, tiny_model


class Killed(Exception):
    """Ends a run."""


class KilledAt(Observer):
    """Ends a run at a unit of work."""

    def __init__(self, unit: int) -> None:
        self.left = unit

    def step(self, step) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


def digest(model) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("family", EXPERTS)
def test_tuned_blocks_and_a_resumed_run(family, tmp_path):
    config = PruneConfig(sweeps=1, passes=1, tail=1, rate=1e-3, baselines=("magnitude",))
    model, tokens = tiny_model(family, dtype=torch.bfloat16), random_tokens(8)
    report = prune_(model, tokens, config)
    assert any(block.kept for block in report.blocks)
    assert not any(block.notes for block in report.blocks)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert all(layer.losses["armorfact"] < layer.losses["magnitude"] for layer in experts)
    assert sum(x.tokens for x in experts if x.decoder_block == 1 and x.name.endswith(".down")) == 2 * tokens.numel()
    assert any(layer.factorized_loss is not None for layer in experts)
    killed = tiny_model(family, dtype=torch.bfloat16)
    with pytest.raises(Killed):
        prune_(killed, tokens, config, journal=tmp_path / "journal", observer=KilledAt(120))
    resumed = tiny_model(family, dtype=torch.bfloat16)
    prune_(resumed, tokens, config, journal=tmp_path / "journal")
    assert digest(resumed) == digest(model)


def test_the_loss_is_that_of_what_is_stored(monkeypatch):
    """In the Gram matrix that the expert was pruned by."""
    grams = {}

    def noted(statistics, layers):
        pool_(statistics, layers)
        grams.update({layer.name: statistics.of(layer.name).gram.clone() for layer in layers})

    monkeypatch.setattr(in_process, "pool_", noted)
    dense, model, tokens = tiny_model("gpt_oss"), tiny_model("gpt_oss"), random_tokens(3)
    weights = {layer.name: layer.weight for layer in chosen_layers(dense)[0]}
    report = prune_(model, tokens, PruneConfig(sweeps=1, passes=1, baselines=()))
    for layer in report.layers:
        if ".experts." in layer.name:
            owner, expert, projection = layer.name.rsplit(".", 2)
            stack, weight = model.get_submodule(owner).stacks[projection], weights[layer.name]
            residual = weight.double() - _exact(stack.each[int(expert)][0])
            loss = energy(residual, grams[layer.name]) / energy(weight, grams[layer.name])
            assert layer.losses["armorfact"] == pytest.approx(loss, rel=1e-6)


def _exact(operands):
    values, left, right = (x.double() for x in (operands.values, operands.left, operands.right))
    return operands._replace(values=values, left=left, right=right).dense()


def inputs_of(rows: dict[str, int]) -> Inputs:
    source, inputs = torch.Generator().manual_seed(0), Inputs()
    for expert, count in rows.items():
        given, inner = torch.randn(count, 8, generator=source), torch.randn(count, 4, generator=source)
        for projection, x in (("gate", given), ("up", given), ("down", inner)):
            inputs.see(f"mlp.experts.{expert}.{projection}", x)
    return inputs


def test_a_rare_expert_borrows_from_all():
    rows = {"0": 30, "2": 2}
    inputs, statistics = inputs_of(rows), Statistics()
    statistics.add(inputs)
    own = {name: statistics.of(name).gram.clone() for name in statistics.leader}
    model = tiny_model("mixtral")
    experts = [layer for layer in chosen_layers(model)[0] if layer.stack and layer.decoder_block == 0]
    layers = [Layer(layer.name.partition("layers.0.")[2], layer.module, 0) for layer in experts]
    pool_(statistics, layers)
    for projection, d_in in (("gate", 8), ("up", 8), ("down", 4)):
        names = {e: f"mlp.experts.{e}.{projection}" for e in range(4)}
        prior = BORROWED * d_in / 32 * (own[names[0]] + own[names[2]])
        for e in (0, 2):
            assert torch.allclose(statistics.of(names[e]).gram, own[names[e]] + prior)
            assert statistics.of(names[e]).tokens == rows[str(e)]
        for e in (1, 3):
            assert torch.allclose(statistics.of(names[e]).gram, prior)
            assert statistics.of(names[e]).tokens == 0


def test_experts_that_no_token_reaches_are_pruned_all_the_same():
    """The router of the first block sends every token to the same two of four experts."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()
    report = prune_(model, random_tokens(), PruneConfig(sweeps=1, refine=None, baselines=("magnitude",)))
    found = [x for x in report.layers if ".0.mlp.experts." in x.name]
    assert len(found) == 12 and sorted(x.tokens for x in found) == 6 * [0] + 6 * [4 * 24]
    assert all(x.losses["armorfact"] < x.losses["magnitude"] for x in found)


def test_the_plan_counts_experts_as_pruned():
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = make_plan(model, random_tokens(), PruneConfig(sweeps=1, baselines=()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    attention, experts, router = 32 * 32 * 2 + 32 * 16 * 2, 4 * 3 * 32 * 16, 4 * 32
    assert plan.stays_dense == pytest.approx(router / (attention + experts + router))
    assert plan.seconds > 0 and len(plan.layers) == (4 + 12) * BLOCKS
    report = prune_(model, random_tokens(), PruneConfig(sweeps=1, refine=None, baselines=()))
    assert [(x.name, x.bytes) for x in plan.layers] == [(x.name, x.bytes) for x in report.layers]
    with pytest.raises(ValueError, match=r"pruned already \(model.layers.0"):
        prune_(model, random_tokens())


def test_experts_of_which_some_do_not_fit_stay_dense_together():
    model = tiny_model("qwen3_moe", moe_intermediate_size=20)
    plan = make_plan(model, random_tokens(), PruneConfig(method="magnitude", pattern="2:8"), measure=False)
    reasons = {x.reason for x in plan.dense_layers if x.name.endswith("0.gate")}
    assert len(plan.layers) == 4 * BLOCKS
    assert all(
        "experts are pruned all together, and model.layers." in x and "20 is not a multiple" in x for x in reasons
    )


def test_the_output_target_leaves_experts_out():
    config = PruneConfig(target="output", refine=None, sweeps=1)
    with pytest.raises(ValueError, match=r"experts\.0\.gate is given the tokens that are routed to it: .*ignore"):
        prune_(tiny_model("mixtral"), random_tokens(), config)


def test_one_shot_methods_prune_experts_without_wrappers():
    model = tiny_model("deepseek_v3")
    report = prune_(model, random_tokens(), PruneConfig(method="wanda", baselines=()))
    assert any(".experts." in layer.name for layer in report.layers)
    stack = model.model.layers[1].mlp.experts.gate
    assert stack.left is None and model(random_tokens(1)).logits.shape[-1] == VOCABULARY
