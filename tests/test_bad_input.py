"""Bad input: a clear error before any work, with the way out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from armorfact import Exact, Pattern, auto_block, factorize, quantize_core
from tests.conftest import gram_matrix

WEIGHT = np.random.default_rng(0).standard_normal((8, 16))
GRAM = gram_matrix(np.random.default_rng(1), 16, "plain")


def changed(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy[1, 2] = value
    return copy


INDEFINITE = GRAM - 2 * np.linalg.eigvalsh(GRAM)[2] * np.eye(16)
NEGATIVE_DIAGONAL = GRAM - 1000 * np.eye(16)
SILENT_BUT_CORRELATED = GRAM.copy()
SILENT_BUT_CORRELATED[0, 0] = 0

CASES = {
    "weight not an array": (([[1.0] * 4],), {}, TypeError, "numpy.asarray"),
    "integer weight": ((np.ones((4, 4), dtype=int),), {}, TypeError, "float32"),
    "complex weight": ((np.ones((4, 4), dtype=complex),), {}, TypeError, "real floating"),
    "vector weight": ((np.ones(4),), {}, ValueError, r"\(d_out, d_in\)"),
    "empty weight": ((np.ones((0, 4)),), {}, ValueError, "non-empty"),
    "nan weight": ((changed(WEIGHT, np.nan),), {}, ValueError, "1 NaN or infinite"),
    "inf gram": ((WEIGHT, changed(GRAM, np.inf)), {}, ValueError, "XXt has 1"),
    "gram of the wrong size": ((WEIGHT, GRAM[:8, :8]), {}, ValueError, r"\(16, 16\)"),
    "asymmetric gram": ((WEIGHT, changed(GRAM, 1e3)), {}, ValueError, "not symmetric"),
    "indefinite gram": ((WEIGHT, INDEFINITE), {}, ValueError, "smallest eigenvalue"),
    "negative diagonal": ((WEIGHT, NEGATIVE_DIAGONAL), {}, ValueError, "negative entry"),
    "silent channel": ((WEIGHT, SILENT_BUT_CORRELATED), {}, ValueError, "zero energy"),
    "integer gram": ((WEIGHT, np.eye(16, dtype=int)), {}, TypeError, "XXt must have a real floating"),
    "group does not divide": ((WEIGHT[:, :14],), {}, ValueError, "multiple of 4"),
    "block does not divide": ((WEIGHT,), {"block": 3}, ValueError, r"these fit: \[1, 2, 4, 8\]"),
    "block not of the group": ((WEIGHT,), {"block": (8, 2)}, ValueError, r"these fit: \[4, 8, 16\]"),
    "block of a wrong type": ((WEIGHT,), {"block": 8.0}, TypeError, "block must be"),
    "block of a wrong name": ((WEIGHT,), {"block": "big"}, ValueError, "auto"),
    "two frameworks": ((torch.tensor(WEIGHT), GRAM), {}, TypeError, "torch array and XXt a numpy"),
    "unknown init": ((WEIGHT,), {"init": "lottery"}, ValueError, "sparsegpt"),
    "init of a wrong type": ((WEIGHT,), {"init": 3}, TypeError, "boolean mask"),
    "mask not boolean": ((WEIGHT,), {"init": np.ones((8, 16))}, TypeError, "must be boolean"),
    "mask too full": ((WEIGHT,), {"init": np.ones((8, 16), dtype=bool)}, ValueError, "allows 2"),
    "mask of a wrong shape": ((WEIGHT,), {"init": np.zeros((4, 16), dtype=bool)}, ValueError, "shape of W"),
    "callback that cannot be called": ((WEIGHT,), {"callback": 3}, TypeError, "function of a Progress"),
    "unknown solver": ((WEIGHT,), {"solver": "magic"}, ValueError, "exact"),
    "solver class": ((WEIGHT,), {"solver": Exact}, TypeError, "call the class"),
    "not a solver": ((WEIGHT,), {"solver": object()}, TypeError, "lacks"),
    "unknown normalization": ((WEIGHT,), {"normalize": "l2"}, ValueError, "nowag"),
    "row weights of a wrong shape": ((WEIGHT,), {"row_weight": np.ones(16)}, ValueError, r"\(8,\)"),
    "row weights not positive": ((WEIGHT,), {"row_weight": np.zeros(8)}, ValueError, "positive"),
    "output blocks of a wrong shape": (
        (WEIGHT,),
        {"output_gram": np.ones((2, 4, 4))},
        ValueError,
        r"\(8,\), one entry a row of W or \(1, 8, 8\), one matrix for each block",
    ),
    "output blocks not definite": ((WEIGHT,), {"output_gram": np.ones((1, 8, 8))}, ValueError, "positive definite"),
    "output blocks of zeros": ((WEIGHT,), {"output_gram": np.zeros((1, 8, 8))}, ValueError, "positive definite"),
    "output blocks not symmetric": (
        (WEIGHT,),
        {"output_gram": np.eye(8)[None] + np.eye(8, k=1)},
        ValueError,
        "not symmetric",
    ),
    "output weights not positive": ((WEIGHT,), {"output_gram": -np.ones(8)}, ValueError, "output_gram must be pos"),
    "both names of the row weights": (
        (WEIGHT,),
        {"output_gram": np.ones(8), "row_weight": np.ones(8)},
        ValueError,
        "give one of them",
    ),
    "row weights of another library": (
        (WEIGHT,),
        {"row_weight": torch.ones(8)},
        TypeError,
        "row_weight a torch one",
    ),
    "pattern of a wrong type": ((WEIGHT,), {"pattern": 24}, TypeError, "'2:4'"),
    "negative budget": ((WEIGHT,), {"max_sweeps": -1}, ValueError, "must not be negative"),
    "sweeps not a number": ((WEIGHT,), {"max_sweeps": float("nan")}, TypeError, "max_sweeps must be an integer"),
    "half a sweep": ((WEIGHT,), {"max_sweeps": 2.5}, TypeError, "max_sweeps must be an integer, got 2.5"),
    "rtol not a number": ((WEIGHT,), {"rtol": float("nan")}, ValueError, "must not be negative"),
    "time not a number": ((WEIGHT,), {"time_limit": float("nan")}, ValueError, "must not be negative"),
    "a seed that is no integer": ((WEIGHT,), {"seed": 0.5}, TypeError, "seed must be an integer"),
    "a negative seed": ((WEIGHT,), {"seed": -1}, ValueError, "seed must not be negative"),
    "a block that is a truth value": ((WEIGHT,), {"block": True}, TypeError, "block must be"),
    "three blocks": ((WEIGHT,), {"block": (4, 4, 4)}, TypeError, "block must be"),
    "a pattern of many supports": ((WEIGHT,), {"pattern": "8:16"}, ValueError, "more than the 100 supports"),
    "a huge pattern": ((WEIGHT,), {"pattern": "5000000:10000000"}, ValueError, "more than the 100 supports"),
    "a pattern of endless digits": ((WEIGHT,), {"pattern": "1:" + "9" * 5000}, ValueError, "must look like"),
    "more than 64 bits": ((WEIGHT.astype(np.longdouble),), {}, TypeError, "64 bits or fewer"),
    "half of a gram in 16 bits": ((WEIGHT, np.triu(GRAM + 0.5).astype(np.float16)), {}, ValueError, "not symmetric"),
    "negative time": ((WEIGHT,), {"time_limit": -1.0}, ValueError, "must not be negative"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    arguments, options, error, message = CASES[name]

    class NeverRun(Exact):
        def init(self, problem, factors, seed):
            raise AssertionError("work was done before the check")

    options = {"block": (8, 8), "solver": NeverRun(), **options}
    with pytest.raises(error, match=message):
        factorize(*arguments, **options)


def test_integers_of_numpy_are_integers():
    base = factorize(WEIGHT, GRAM, block=8, max_sweeps=2, seed=3)
    same = factorize(WEIGHT, GRAM, block=np.int64(8), max_sweeps=np.int32(2), seed=np.uint8(3))
    np.testing.assert_array_equal(same.dense(), base.dense())
    assert factorize(WEIGHT, block=(np.int64(4), 8), max_sweeps=0).left.blocks.shape == (2, 4, 4)
    assert Pattern(np.int64(2), np.int64(4)) == Pattern(2, 4)
    with pytest.raises(TypeError, match="integer"):
        Pattern(2.0, 4)


@pytest.mark.parametrize("init", ["sparsegpt", "wanda", "nowag", "magnitude"])
def test_every_initialization_takes_a_gram_matrix_that_16_bits_rounded_unevenly(init):
    gram = (GRAM + 0.5).astype(np.float16)
    gram[0, 1] = np.nextafter(gram[0, 1], np.float16(np.inf))
    result = factorize(WEIGHT.astype(np.float16), gram, block=4, init=init, max_sweeps=1)
    assert result.loss <= result.initial_loss


def test_an_indefinite_matrix_is_refused_in_16_bits_too():
    signs = np.random.default_rng(0).choice([-0.6, 0.6], (256, 256))
    matrix = np.triu(signs, 1) + np.triu(signs, 1).T + np.eye(256)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with pytest.raises(ValueError, match="not positive semidefinite"):
        factorize(weight, torch.from_numpy(matrix).bfloat16(), block=4)


def test_another_order_of_bytes_is_read():
    here, there = (factorize(WEIGHT.astype(f"{order}f8"), GRAM, block=4, max_sweeps=2) for order in "<>")
    assert here.loss == there.loss and there.left.blocks.dtype.isnative


def test_a_warm_start_of_another_size_altogether_is_refused():
    far = factorize((WEIGHT * 1e30).astype(np.float32), None, block=4, max_sweeps=1)
    with pytest.raises(ValueError, match="too far apart in size"):
        factorize((WEIGHT * 1e-30).astype(np.float32), None, block=4, init=far)


def test_factors_that_are_trained_start_warm():
    first = factorize(torch.from_numpy(WEIGHT), None, block=4, max_sweeps=1)
    trained = replace(first, left=replace(first.left, blocks=torch.nn.Parameter(first.left.blocks)))
    assert factorize(torch.from_numpy(WEIGHT), None, block=4, init=trained, max_sweeps=1).loss <= first.loss


def test_a_warm_start_of_another_shape_is_refused():
    result = factorize(WEIGHT, block=4, max_sweeps=1)
    with pytest.raises(ValueError, match="warm start"):
        factorize(WEIGHT, block=8, init=result)


def test_auto_takes_the_largest_block_up_to_128_that_fits():
    result = factorize(np.ones((192, 24)), max_sweeps=0)
    assert (result.left.blocks.shape[-1], result.right.blocks.shape[-1]) == (96, 24)
    assert auto_block((192, 24)) == (96, 24)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_gram_matrix_with_rounding_in_it_is_accepted(dtype):
    rng = np.random.default_rng(2)
    gram = gram_matrix(rng, 64, "deficient").astype(dtype)
    assert factorize(rng.standard_normal((8, 64)), gram, block=8, max_sweeps=1).loss >= 0


DEVICES = {
    "XXt": {"XXt": torch.ones(16, device="meta")},
    "row_weight": {"row_weight": torch.ones(8, device="meta")},
    "output_gram": {"output_gram": torch.ones(8, device="meta")},
    "the mask": {"init": torch.ones((8, 16), dtype=torch.bool, device="meta")},
}


@pytest.mark.parametrize("name", DEVICES)
def test_an_argument_on_another_device_is_named(name):
    with pytest.raises(ValueError, match=f"W is on cpu and {name} on meta"):
        factorize(torch.tensor(WEIGHT), block=8, **DEVICES[name])


def test_a_warm_start_on_another_device_or_beyond_the_dtype_is_refused():
    result = factorize(torch.tensor(WEIGHT), block=8, max_sweeps=1)
    away = replace(result, core=replace(result.core, values=result.core.values.to("meta")))
    with pytest.raises(ValueError, match="the warm start on meta"):
        factorize(torch.tensor(WEIGHT), block=8, init=away)
    large = factorize(WEIGHT * 1e10, block=8, max_sweeps=1)
    with pytest.raises(ValueError, match="does not fit into float16"):
        factorize(WEIGHT.astype(np.float16), block=8, init=large)


@pytest.mark.parametrize("shape", [(4, 8), (64, 64), (192, 24), (1024, 640), (96, 1000), (7, 12), (5120, 128)])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_auto_under_a_limit_is_the_largest_light_square_block(shape, pattern):
    group = Pattern.parse(pattern).group
    square = [b for b in range(1, 129) if not (b % group or shape[0] % b or shape[1] % b)]
    light = [b for b in square if b / shape[0] + b / shape[1] <= 1 / 8]
    expected = max(light) if light else min(square, default=None)
    assert auto_block(shape, pattern, 1 / 8) == (expected and (expected, expected))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 8).to(torch.float8_e4m3fn), "16 bits or more a number"),
        (torch.ones(4, 8).to_sparse(), "hold its numbers densely"),
        (torch.ones(4, 8, device="meta"), "hold its numbers densely"),
        (np.ma.masked_array(np.ones((4, 8)), np.zeros((4, 8), bool)), "must be a NumPy, Torch or CuPy array"),
    ],
    ids=["float8", "sparse", "meta", "masked"],
)
def test_arrays_of_special_kinds_are_refused_in_a_sentence(weight, message):
    with pytest.raises(TypeError, match=message):
        factorize(weight, block=4)


@pytest.mark.parametrize("call", [factorize, lambda w, **k: quantize_core(factorize(w, block=4, max_sweeps=1), w, **k)])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"callback": 3}, TypeError, "callback must be a function of a Progress, got 3"),
        ({"rtol": "x"}, TypeError, "rtol must be a number, got 'x'"),
        ({"time_limit": "1 h"}, TypeError, "time_limit must be a number, got '1 h'"),
    ],
)
def test_budgets_and_callbacks_are_looked_at_before_any_work(call, options, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((4, 8)), **options)


@pytest.mark.parametrize(("patience", "error"), [(0, ValueError), (None, TypeError)])
def test_patience_is_a_number_of_sweeps(patience, error):
    with pytest.raises(error, match="patience must be"):
        factorize(np.ones((4, 8)), block=4, solver=Exact(patience=patience))
