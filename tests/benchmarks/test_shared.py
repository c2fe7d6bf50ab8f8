"""One B for several projections: its blocks, the importance of rows, the parts of a stack, and a whole tiny run."""

from __future__ import annotations

import pytest
import torch

from armorfact import factorize
from armorfact_hf import PruneConfig
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.losses import energy
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers import in_process
from benchmarks import results
from benchmarks.shared import __main__ as command
from benchmarks.shared import quality, speed
from benchmarks.shared.sharing import Sharing, common_block, parts, relative_weights, shared_right
from tests.hf.models import random_tokens, tiny_model

SMOLLM2 = [(576, 576), (192, 576), (192, 576)], [(36, 36), (16, 16), (16, 16)]


def entries(shapes, blocks):
    return sum(b_out * d_out + b_in * d_in for (d_out, d_in), (b_out, b_in) in zip(shapes, blocks, strict=True))


@pytest.mark.parametrize("square", [True, False])
def test_shared_wrappers_have_no_more_entries_and_fit_every_part(square):
    shapes, blocks = SMOLLM2
    b_out, b_in = common_block(shapes, blocks, Sharing(square))
    assert b_out * sum(d_out for d_out, _ in shapes) + b_in * 576 <= entries(shapes, blocks)
    assert all(d_out % b_out == 0 and d_in % b_in == 0 for d_out, d_in in shapes) and b_in % 4 == 0
    assert (b_out == b_in) == square


def test_b_grows_by_what_the_other_b_took():
    assert common_block([(1536, 576)] * 2, [(48, 48)] * 2, Sharing()) == (48, 96)
    assert common_block(*SMOLLM2, Sharing()) == (24, 72)


def test_even_blocks_count_a_b_for_each():
    assert common_block(*SMOLLM2, Sharing(apart=True)) == (24, 24)
    assert entries(*SMOLLM2) >= 3 * 24 * 576 + 24 * 960


def stacked(seed=0):
    """Two weights of very different sizes, and the Gram matrix of their inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(d_out, 16, generator=generator) * scale for d_out, scale in ((8, 10.0), (16, 0.1))]
    inputs = torch.randn(16, 64, generator=generator)
    return weights, inputs @ inputs.T


def test_weighted_losses_add_up_relatively():
    weights, gram = stacked()
    importance = relative_weights(weights, gram)
    found = factorize(torch.cat(weights), gram, block=4, row_weight=importance, max_sweeps=3)
    residuals = (torch.cat(weights) - found.dense()).split([8, 16])
    relative = [energy(r, gram) / energy(w, gram) for r, w in zip(residuals, weights, strict=True)]
    assert found.relative_loss == pytest.approx(sum(relative) / 2, rel=1e-4)


def test_parts_are_the_rows_of_the_whole():
    weights, gram = stacked()
    found = factorize(torch.cat(weights), gram, block=(4, 8), max_sweeps=2)
    layers = [FactorizedLinear.of(*factors) for factors in parts(found, [8, 16])]
    torch.testing.assert_close(torch.cat([layer.weight for layer in layers]), found.dense())


def test_a_model_is_pruned_with_one_b_for_those_of_the_same_input():
    model, kept = tiny_model("llama"), in_process.prune_layers
    with shared_right(Sharing(relative=True)):
        report = prune_(model, random_tokens(), PruneConfig(sweeps=2, refine=None, baselines=(), block=4))
    assert in_process.prune_layers is kept
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for first, second in ((attention.q_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert torch.equal(first.right, second.right)
    found = quality.figures(report)
    in_model = {id(m): m for m in model.modules() if isinstance(m, FactorizedLinear)}.values()
    copies = sum(m.right.nbytes for b in model.model.layers for m in (b.self_attn.k_proj, b.self_attn.v_proj))
    copies += sum(b.mlp.up_proj.right.nbytes for b in model.model.layers)
    assert sum(x.bytes for x in report.layers) == sum(m.nbytes for m in in_model) - copies
    assert found["losses"].keys() == {x.name.rpartition(".")[2] for x in report.layers}
    assert 0 < found["loss"] < 1


def test_even_blocks_leave_every_layer_its_b():
    model = tiny_model("llama")
    with shared_right(Sharing(apart=True)):
        report = prune_(model, random_tokens(), PruneConfig(sweeps=1, refine=None, baselines=()))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.block == attention.k_proj.block
    assert not torch.equal(attention.q_proj.right, attention.k_proj.right)
    in_model = [m for m in model.modules() if isinstance(m, FactorizedLinear)]
    assert sum(x.bytes for x in report.layers) == sum(m.nbytes for m in in_model)


def test_the_command_prints_both_tables_and_measures_once(model_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "TEXTS", [Evaluation(str(text_file), windows=1, length=16)] * 2)
    monkeypatch.setattr(command, "dense_figures", lambda *_: [50.0, 60.0])
    monkeypatch.setattr(quality, "Calibration", lambda: Calibration(str(text_file), windows=2, length=16))
    given = ["perplexity", "--model", str(model_folder), "--out", str(tmp_path), "--forms", "shared wide"]
    command.main(given)
    printed = capsys.readouterr().out
    assert "| one each |" in printed and "| shared wide |" in printed and "q_proj" in printed
    monkeypatch.setattr(quality, "measure", None)
    command.main(given)
    assert capsys.readouterr().out in printed


def test_speed_is_measured_in_every_form(monkeypatch):
    monkeypatch.setitem(speed.GROUPS, "small", ((64, 32), 64))
    monkeypatch.setattr("armorfact_hf.bench.timing.SECONDS", 0)
    assert len(speed.speed_row("small", held=1 << 16, repeats=2)) == len(speed.HEADER)
