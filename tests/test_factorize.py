"""Theorems about whole runs: monotone, never worse than the start, invariant, exact where it can be."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import armorfact
from armorfact import Adam, Best, Ending, Exact, Factors, Gradient, factorize, sparsegpt
from armorfact.solvers import adam
from armorfact.steps.left import left_step
from tests.conftest import KINDS, gram_matrix, random_factors, random_problem


def case(seed: int, kind: str = "plain", d_out: int = 16, d_in: int = 24):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((d_out, d_in)), gram_matrix(rng, d_in, kind)


def trace_loss(weight, approximation, gram) -> float:
    residual = np.float64(weight) - np.float64(approximation)
    return float(np.sum((residual @ np.float64(gram)) * residual))


@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from([(8, 8), (16, 24), (1, 4), (4, 12)]),
    st.sampled_from([Exact(max_sweeps=6), Gradient(max_sweeps=6), Adam(max_sweeps=6, learning_rate=1e-2)]),
)
def test_losses_never_rise_and_never_end_above_sparsegpt(seed, kind, diagonal, dtype, block, solver):
    weight, gram = case(seed, kind)
    weight, gram = weight.astype(dtype), gram.astype(np.float32)
    given_gram = gram.diagonal().copy() if diagonal else gram
    result = factorize(weight, given_gram, block=block, solver=solver)
    losses = [sweep.loss for sweep in result.history]
    assert losses == sorted(losses, reverse=True)
    assert result.loss <= result.initial_loss
    full = np.diag(given_gram) if diagonal else gram
    assert result.loss == pytest.approx(trace_loss(weight, _dense64(result), full), rel=1e-6, abs=1e-9)
    start = trace_loss(weight, sparsegpt(weight, given_gram), full)
    assert result.initial_loss == pytest.approx(start, rel=1e-3 if dtype != np.float64 else 1e-9)
    assert result.dense().dtype == dtype
    assert result.core.pattern.most_kept(result.core.dense()) <= 2


def _dense64(result):
    return result.factors.astype(np.float64).dense()


@pytest.mark.parametrize("solver", ["exact", "gradient", "adam"])
def test_same_input_and_seed_give_the_same_bits(solver):
    weight, gram = case(3)
    first, second = (factorize(weight, gram, block=8, solver=solver, max_sweeps=5, seed=7) for _ in range(2))
    for a, b in zip(dataclasses.astuple(first.factors), dataclasses.astuple(second.factors), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inputs_are_not_modified_and_may_be_read_only_and_strided():
    weight, gram = case(4)
    strided = np.repeat(weight, 2, axis=1)[:, ::2]
    strided.flags.writeable = False
    gram.flags.writeable = False
    expected = factorize(weight.copy(), gram.copy(), block=8, max_sweeps=3)
    result = factorize(strided, gram, block=8, max_sweeps=3)
    np.testing.assert_array_equal(result.dense(), expected.dense())
    np.testing.assert_array_equal(strided, weight)


@given(st.integers(0, 10**6))
def test_scaling_weight_or_inputs_scales_the_answer(seed):
    weight, gram = case(seed)
    base = factorize(weight, gram, block=8, max_sweeps=4)
    scaled = factorize(4 * weight, gram, block=8, max_sweeps=4)
    louder = factorize(weight, 16 * gram, block=8, max_sweeps=4)
    np.testing.assert_allclose(scaled.dense(), 4 * base.dense(), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(louder.dense(), base.dense(), rtol=1e-6, atol=1e-8)
    assert louder.loss == pytest.approx(16 * base.loss, rel=1e-6)


def test_permuting_the_blocks_of_a_permutes_the_answer():
    weight, gram = case(5)
    order = np.r_[8:16, 0:8]
    base = factorize(weight, gram, block=8, max_sweeps=4)
    permuted = factorize(weight[order], gram, block=8, max_sweeps=4)
    np.testing.assert_allclose(permuted.dense(), base.dense()[order], rtol=1e-8, atol=1e-10)


def test_permuting_rows_inside_a_block_leaves_the_initial_and_left_step_loss_alone():
    class LeftSteps:
        max_sweeps, rtol, patience = 2, 0.0, 3

        def init(self, problem, factors, seed):
            return Best(factors, problem.loss(factors))

        def step(self, problem, state, best):
            moved, _ = left_step(problem, state.factors)
            return Best(moved, problem.loss(moved))

    weight, gram = case(5)
    order = np.r_[np.random.default_rng(0).permutation(8), 8:16]
    for sweeps in (0, 2):
        base, permuted = (
            factorize(w, gram, block=8, max_sweeps=sweeps, solver=LeftSteps()) for w in (weight, weight[order])
        )
        assert permuted.loss == pytest.approx(base.loss, rel=1e-10)
        np.testing.assert_allclose(permuted.dense(), base.dense()[order], rtol=1e-8, atol=1e-10)
        assert (base.loss < base.initial_loss) == (sweeps > 0)


def test_factors_are_in_the_canonical_gauge():
    result = factorize(*case(6), block=8, max_sweeps=4)
    np.testing.assert_allclose(np.linalg.norm(result.left.blocks, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(result.right.blocks, axis=2), 1, rtol=1e-12)


def test_a_planted_factorization_is_recovered_from_its_support():
    rng = np.random.default_rng(8)
    _, gram = case(8)
    core = rng.standard_normal((16, 24))
    mask = armorfact.Pattern(2, 4).top_mask(np.abs(core))
    left, right = (np.eye(4) + 0.2 * rng.standard_normal((count, 4, 4)) for count in (4, 6))
    weight = Factors(left, np.where(mask, core, 0), right).dense()
    result = factorize(weight, gram, block=4, init=mask, max_sweeps=3000, rtol=0)
    assert result.relative_loss < 1e-8


def test_one_dense_block_reaches_zero():
    weight, gram = case(9, d_out=16, d_in=16)
    result = factorize(weight, gram, block=16, max_sweeps=100, rtol=0)
    assert result.relative_loss < 1e-9


def test_warm_start_goes_on_from_where_the_result_ended():
    weight, gram = case(10)
    first = factorize(weight, gram, block=8, max_sweeps=3)
    second = factorize(weight, gram, block=8, max_sweeps=3, init=first)
    assert second.initial_loss == pytest.approx(first.loss, rel=1e-9)
    assert second.loss < first.loss


def test_row_weights_are_factors_of_the_rows_errors():
    weight, gram = case(11)
    row_weight = np.linspace(0.5, 4, 16)
    result = factorize(weight, gram, block=8, row_weight=row_weight, max_sweeps=4)
    root = np.sqrt(row_weight)[:, None]
    assert result.loss == pytest.approx(trace_loss(root * weight, root * result.dense(), gram), rel=1e-9)


def output_grams(seed: int, count: int, size: int) -> np.ndarray:
    gradients = np.random.default_rng(seed).standard_normal((count, size, 2 * size))
    return gradients @ np.swapaxes(gradients, 1, 2)


@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([None, "nowag"]),
    st.integers(-60, 60),
)
def test_an_output_gram_is_what_the_loss_is_measured_in(seed, kind, dtype, normalize, scale):
    weight, gram = case(seed, kind)
    weight, outputs = weight.astype(dtype), output_grams(seed, 2, 8) * 2.0**scale
    options = {"block": 8, "max_sweeps": 4, "normalize": normalize}
    result = factorize(weight, gram, output_gram=outputs, **options)
    full = np.zeros((16, 16))
    full[:8, :8], full[8:, 8:] = outputs
    column = row = np.ones(1)
    if normalize:
        column = np.linalg.norm(np.float64(weight), axis=0)
        row = np.linalg.norm(weight / column, axis=1)[:, None]

    def loss(approximation):
        residual = (np.float64(weight) - np.float64(approximation)) / column / row
        return np.sum((full @ residual @ gram) * residual)

    assert result.loss == pytest.approx(loss(_dense64(result)), rel=1e-5, abs=1e-12 * result.weight_loss)
    assert result.initial_loss == pytest.approx(loss(sparsegpt(weight, gram)), rel=1e-5)
    assert result.loss <= result.initial_loss
    plain = factorize(weight, gram, **options)
    assert result.loss <= loss(_dense64(plain)) or result.loss < 0.9 * result.initial_loss


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_output_gram_of_identities_changes_no_bit_and_a_vector_is_the_row_weight(dtype):
    weight, gram = case(11)
    weight = weight.astype(dtype)
    base = factorize(weight, gram, block=8, max_sweeps=6)
    for same in (np.tile(np.eye(8), (2, 1, 1)), 4 * np.tile(np.eye(8), (2, 1, 1)), np.ones(16)):
        found = factorize(weight, gram, block=8, max_sweeps=6, output_gram=same)
        for a, b in zip(dataclasses.astuple(found.factors), dataclasses.astuple(base.factors), strict=True):
            np.testing.assert_array_equal(a, b)
    importance = np.linspace(0.5, 4, 16)
    weighted = factorize(weight, gram, block=8, max_sweeps=6, row_weight=importance)
    same = factorize(weight, gram, block=8, max_sweeps=6, output_gram=importance)
    np.testing.assert_array_equal(same.dense(), weighted.dense())
    blocks = np.stack([np.diag(importance[:8]), np.diag(importance[8:])])
    diagonal = factorize(weight, gram, block=8, max_sweeps=0, output_gram=blocks)
    assert diagonal.loss == pytest.approx(factorize(weight, gram, block=8, max_sweeps=0, row_weight=importance).loss)


def test_nowag_normalization_measures_the_papers_loss():
    weight, gram = case(12)
    column = np.linalg.norm(weight, axis=0)
    row = np.linalg.norm(weight / column, axis=1)
    scale = row[:, None] * column
    energy = gram.diagonal().copy()
    result = factorize(weight, energy, block=8, normalize="nowag", max_sweeps=4)
    assert result.loss == pytest.approx(trace_loss(weight / scale, result.dense() / scale, np.diag(energy)), rel=1e-9)
    assert result.loss < result.initial_loss


def test_apply_multiplies_by_the_factors():
    result = factorize(*case(13), block=(4, 8), max_sweeps=2)
    x = np.random.default_rng(0).standard_normal((2, 5, 24))
    np.testing.assert_allclose(result.apply(x), x @ result.dense().T, rtol=1e-10, atol=1e-12)
    kept, packed, wrappers = 16 * 12 * 8, 16 * 3, (16 * 4 + 24 * 8) * 8
    assert result.nbytes == kept + packed + wrappers
    assert result.compression == 16 * 24 * 8 / result.nbytes


@given(st.integers(-6, 6), st.integers(-6, 6), st.sampled_from([None, "nowag"]))
def test_history_and_progress_are_in_the_units_of_the_result(weight_scale, gram_scale, normalize):
    weight, gram = case(14)
    seen = []
    result = factorize(
        weight * 2.0**weight_scale,
        gram * 2.0**gram_scale,
        block=8,
        max_sweeps=4,
        normalize=normalize,
        callback=seen.append,
    )
    assert result.history[0].loss == pytest.approx(result.initial_loss) and result.history[0].number == 0
    assert result.history[-1].loss == pytest.approx(result.loss)
    assert [progress.loss for progress in seen] == [sweep.loss for sweep in result.history[1:]]
    for progress in seen:
        assert progress.relative_loss == pytest.approx(progress.loss / result.weight_loss) and progress.max_sweeps == 4
    seconds = [progress.seconds for progress in seen]
    assert seconds[0] > 0 and seconds == sorted(seconds)


def test_adam_steps_as_torchs_does(monkeypatch):
    """Without the group step, which is another's."""
    problem = random_problem(3)
    start = random_factors(problem, 3)
    monkeypatch.setattr(adam, "one_group_step", lambda problem, factors, rng: (factors, problem.loss(factors)))
    solver = Adam(learning_rate=1e-2)
    state = solver.init(problem, start, 0)
    theirs = [torch.tensor(part, requires_grad=True) for part in (start.left, start.core, start.right)]
    optimizer = torch.optim.Adam(theirs, lr=1e-2)
    for _ in range(5):
        found = Factors(*(part.detach().numpy() for part in theirs))
        for part, gradient in zip(theirs, adam.gradients(problem, found), strict=True):
            part.grad = torch.from_numpy(gradient)
        optimizer.step()
        state = solver.step(problem, state, Best(state.factors, state.loss))
    for ours, part in zip((state.factors.left, state.factors.core, state.factors.right), theirs, strict=True):
        np.testing.assert_allclose(ours, part.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert state.loss < problem.loss(start)


@pytest.mark.parametrize("solver", ["gradient", "adam"])
def test_another_seed_visits_other_groups(solver):
    weight, gram = case(14)
    found = [factorize(weight, gram, block=8, solver=solver, max_sweeps=20, seed=seed).core.mask for seed in (0, 1)]
    assert not np.array_equal(*found)


def test_callback_and_budgets_stop_the_run_with_a_sentence():
    weight, gram = case(14)
    seen = []
    result = factorize(weight, gram, block=8, callback=lambda p: seen.append(p) or len(seen) == 2)
    assert "callback" in result.status
    assert [p.sweep for p in seen] == [1, 2]
    assert "time limit" in factorize(weight, gram, block=8, time_limit=0).status
    assert "sweep limit of 2" in factorize(weight, gram, block=8, max_sweeps=2).status
    assert "converged" in factorize(weight, gram, block=8, rtol=0.5).status


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({"rtol": 0.5}, Ending.CONVERGED),
        ({"max_sweeps": 2}, Ending.SWEEP_LIMIT),
        ({"time_limit": 0}, Ending.TIME_LIMIT),
        ({"callback": lambda progress: True}, Ending.CALLBACK),
    ],
)
def test_a_status_is_a_kind_that_reads_as_a_sentence(options, ending):
    status = factorize(*case(14), block=8, **options).status
    assert status.ending is ending and ending.value in status
    assert f"{status}" == str(status) and json.loads(json.dumps({"status": status}))["status"] == status
    again = pickle.loads(pickle.dumps(status))
    assert again == status and again.ending is ending
    assert factorize(np.zeros((8, 8)), block=8).status.ending is Ending.SOLVED


def test_a_solver_of_the_users_own_runs_and_a_rising_one_does_no_harm():
    class Worse:
        max_sweeps, rtol, patience = 3, 0.0, 5

        def init(self, problem, factors, seed):
            return Exact().init(problem, factors, seed)

        def step(self, problem, state, best):
            moved = state.factors.replace(core=2 * state.factors.core)
            return dataclasses.replace(state, factors=moved, loss=problem.loss(moved))

    result = factorize(*case(15), block=8, solver=Worse())
    assert len(result.history) == 1
    assert result.loss == result.initial_loss


@pytest.mark.parametrize("init", ["sparsegpt", "wanda", "nowag", "magnitude"])
@pytest.mark.parametrize("weight", [np.zeros((8, 8)), np.ones((8, 8)), np.eye(8)])
def test_zero_constant_and_tied_weights_are_normal(init, weight):
    gram = gram_matrix(np.random.default_rng(0), 8, "dead")
    result = factorize(weight, gram, block=4, init=init, max_sweeps=3)
    assert result.loss <= result.initial_loss
    assert np.isfinite(result.dense()).all()
    assert np.isfinite(factorize(weight, 0 * gram, block=4, init=init, max_sweeps=3).dense()).all()


def test_the_core_imports_no_framework():
    code = (
        "import sys, armorfact, numpy as np;"
        "armorfact.factorize(np.eye(8, dtype=np.float32), block=4, max_sweeps=1);"
        "assert not {'torch', 'cupy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_factorizes_too_and_no_pool_of_numba_is_started():
    code = """
import os, numpy as np, armorfact
weight = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
expected = armorfact.factorize(weight, weight @ weight.T, block=64, max_sweeps=2).loss
from numba.np.ufunc import parallel
assert not parallel._is_initialized
child = os.fork()
if child == 0:
    os._exit(armorfact.factorize(weight, weight @ weight.T, block=64, max_sweeps=2).loss != expected)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_loss_over_none_is_infinite():
    weight, kept = np.array([[1.0, -1.0, 0.0, 0.0]]), np.array([[True, False, False, False]])
    result = factorize(weight, np.ones((4, 4)), block=(1, 4), init=kept, max_sweeps=0)
    assert result.loss > 0 == result.weight_loss and result.relative_loss == np.inf


@pytest.mark.parametrize("solver", ["exact", "gradient"])
def test_row_weights_may_lie_far_apart(solver):
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((8, 16)).astype(np.float32), rng.standard_normal((16, 50))
    importance = np.geomspace(1, 1e50, 8)
    result = factorize(weight, inputs @ inputs.T, block=4, row_weight=importance, solver=solver, max_sweeps=3)
    assert result.loss <= result.initial_loss < np.inf
