"""NumPy, Torch and array-api-strict give the same factors, in their own type and dtype."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch

from armorfact import arrays, factorize, nowag, quantize_core, sparsegpt, wanda
from tests.conftest import gram_matrix

CONVERSIONS = [torch.tensor, array_api_strict.asarray]


def inputs():
    rng = np.random.default_rng(0)
    return rng.standard_normal((16, 24)), gram_matrix(rng, 24, "plain")


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("solver", ["exact", "gradient", "adam"])
def test_same_factors_as_numpy(convert, diagonal, solver):
    weight, gram = inputs()
    gram = gram.diagonal().copy() if diagonal else gram
    options = {"block": 8, "solver": solver, "max_sweeps": 3}
    expected = factorize(weight, gram, **options)
    result = factorize(convert(weight), convert(gram), **options)
    assert type(result.core.values) is type(convert(weight))
    for found, wanted in zip(
        (result.left.blocks, result.core.values, result.core.packed, result.right.blocks),
        (expected.left.blocks, expected.core.values, expected.core.packed, expected.right.blocks),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-7, atol=1e-9)
    x = np.random.default_rng(1).standard_normal((3, 24))
    np.testing.assert_allclose(np.asarray(result.apply(convert(x))), expected.apply(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_few_tokens_and_weighted_outputs_give_the_loss_of_numpy(convert):
    rng = np.random.default_rng(4)
    weight, inputs, gradients = (
        rng.standard_normal((16, 24)),
        rng.standard_normal((24, 20)),
        rng.standard_normal((16, 9)),
    )
    outputs = np.stack([np.eye(8) + part @ part.T for part in (gradients[:8], gradients[8:])])
    gram = inputs @ inputs.T
    expected = factorize(weight, gram, block=8, max_sweeps=3, output_gram=outputs)
    result = factorize(convert(weight), convert(gram), block=8, max_sweeps=3, output_gram=convert(outputs))
    assert type(result.core.values) is type(convert(weight))
    assert result.loss == pytest.approx(expected.loss, rel=1e-3)
    assert result.initial_loss == pytest.approx(expected.initial_loss, rel=1e-9)


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("method", [sparsegpt, wanda, nowag])
def test_same_pruning_as_numpy(convert, method):
    weight, gram = inputs()
    pruned = method(convert(weight), convert(gram))
    assert type(pruned) is type(convert(weight))
    np.testing.assert_allclose(np.asarray(pruned), method(weight, gram), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torch_dtypes_come_back_and_the_loss_is_that_of_the_rounded_factors(dtype):
    weight, gram = (torch.tensor(x) for x in inputs())
    parameter = torch.nn.Parameter(weight.to(dtype))
    result = factorize(parameter, gram.float(), block=8, max_sweeps=4)
    assert result.core.values.dtype == dtype
    residual = parameter.detach().double() - result.factors.astype(torch.float64).dense()
    assert result.loss == pytest.approx(float(torch.sum(residual @ gram.float().double() * residual)), rel=1e-5)
    assert result.loss <= result.initial_loss


class Labelled(torch.Tensor):
    """A class of a user's own."""


def test_a_tensor_of_a_class_derived_from_torchs_is_one_of_torch():
    weight, gram = (torch.tensor(x) for x in inputs())
    result = factorize(weight.as_subclass(Labelled), gram, block=8, max_sweeps=2)
    assert result.loss == factorize(weight, gram, block=8, max_sweeps=2).loss


def test_autocast_around_it_changes_no_bit():
    weight, gram = (torch.tensor(x, dtype=torch.float32) for x in inputs())
    expected, pruned = factorize(weight, gram, block=8, max_sweeps=3), sparsegpt(weight, gram)
    whole = quantize_core(expected, weight, gram)
    with torch.autocast("cpu", torch.bfloat16):
        found = factorize(weight, gram, block=8, max_sweeps=3)
        assert torch.equal(sparsegpt(weight, gram), pruned)
        assert quantize_core(found, weight, gram).loss == whole.loss
    assert found.loss == expected.loss and torch.equal(found.core.values, expected.core.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_result_is_applied_to_inputs_of_another_dtype(dtype):
    weight, gram = (torch.tensor(x, dtype=torch.float32) for x in inputs())
    result = factorize(weight, gram, block=8, max_sweeps=2)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = result.apply(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), x.float() @ result.dense().T, rtol=5e-2, atol=5e-2)


def test_running_out_of_memory_is_not_taken_for_a_matrix_without_a_factor(monkeypatch):
    weight, gram = (torch.tensor(x) for x in inputs())

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(arrays.namespace(weight).linalg, "cholesky", full)
    with pytest.raises(torch.OutOfMemoryError):
        sparsegpt(weight, gram)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_factors_of_the_cpu():
    weight, gram = (torch.tensor(x) for x in inputs())
    expected = factorize(weight, gram, block=8, max_sweeps=3)
    result = factorize(weight.cuda(), gram.cuda(), block=8, max_sweeps=3)
    assert result.core.values.device.type == "cuda"
    torch.testing.assert_close(result.dense().cpu(), expected.dense(), rtol=1e-6, atol=1e-8)
