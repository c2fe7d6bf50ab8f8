"""A digest changes with dtype, shape and value alone, and what differs from its own is named."""

from __future__ import annotations

import hashlib

import pytest
import torch

from armorfact_hf.checkpoint.description import digests, tensor_digest
from armorfact_hf.checkpoint.verify import check_headers, verify
from tests.hf.checkpoint.cases import NAME, described, random_layer, tensors_of, written


def test_a_digest_is_that_of_dtype_shape_and_little_endian_bytes():
    expected = hashlib.sha256(b"float32 [1, 2]\n\0\0\x80\x3f\0\0\0\xc0").hexdigest()
    assert tensor_digest(torch.tensor([[1.0, -2.0]])) == expected == digests({"a": torch.tensor([[1.0, -2.0]])})["a"]
    assert expected == "b2dbede3426aaf18e53049bef500100d1d45992c6d7151f7c258934bd8f8917e"  # in docs/format.md


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (4, 6), (2, 1, 3)])
def test_a_digest_changes_with_dtype_shape_and_value_alone(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    spread = torch.zeros((*shape, 2), dtype=dtype)
    spread[..., 0] = 1
    backwards = tuple(reversed(range(tensor.ndim)))
    assert tensor_digest(tensor) == tensor_digest(spread[..., 0])
    assert tensor_digest(tensor) == tensor_digest(tensor.permute(backwards).contiguous().permute(backwards))
    assert tensor_digest(tensor) != tensor_digest(tensor.to(torch.float32))
    assert tensor_digest(tensor) != tensor_digest(tensor[None])
    assert tensor.numel() == 0 or tensor_digest(tensor) != tensor_digest(torch.zeros_like(tensor))


def damaged_digests():
    right = digests(tensors_of({NAME: random_layer()}))
    changed = f"{NAME}.left is damaged (its sha256 differs): copy or download it again"
    yield right | {f"{NAME}.left": "0" * 64}, changed
    yield right | {"model.norm.weight": right["model.scale"]}, "tensor model.norm.weight is damaged"
    for part in ("values", "positions", "left", "right", "bias"):
        without = {name: digest for name, digest in right.items() if name != f"{NAME}.{part}"}
        yield without, f"{NAME}.{part} has no digest, although config.json lists those of the others"
    yield {"model.scale": right["model.scale"]}, f"tensor {NAME}."


@pytest.mark.parametrize(("sha256", "sentence"), list(damaged_digests()))
def test_a_digest_that_differs_or_is_absent_is_named(tmp_path, sha256, sentence):
    path = written(tmp_path, tensors_of({NAME: random_layer()}))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        verify([path], described({NAME: random_layer()}, sha256))
    assert sentence in str(caught.value) and str(path) in str(caught.value)


def test_digests_of_tensors_that_were_not_saved_are_allowed(tmp_path):
    tensors = tensors_of({NAME: random_layer()})
    tensors["embed.weight"] = torch.ones(2, 2)
    sha256 = digests({**tensors, "lm_head.weight": tensors["embed.weight"]})  # tied to it
    assert verify([written(tmp_path, tensors)], described({NAME: random_layer()}, sha256)).digests


def test_biases_and_vectors_may_be_tied_too(tmp_path):
    """transformers leaves what is tied out of the files: the bias of BERT's decoder, whole blocks of Zamba."""
    tensors = tensors_of({NAME: random_layer()}) | {
        "predictions.bias": torch.arange(4.0),
        "layers.2.norm.weight": torch.ones(3),
    }
    tied = {"predictions.decoder.bias": tensors["predictions.bias"], "layers.4.norm.weight": torch.ones(3)}
    sha256 = digests({**tensors, **tied})
    written(tmp_path, tensors)
    check_headers(tmp_path, described({NAME: random_layer()}, sha256))
    with pytest.raises(ValueError, match=r"the files lack predictions\.decoder\.bias"):
        check_headers(tmp_path, described({NAME: random_layer()}, sha256 | {"predictions.decoder.bias": "0" * 64}))


@pytest.mark.parametrize("missing", ["embed.weight", "norm.weight"])
def test_what_has_a_digest_is_needed_in_whatever_module(tmp_path, missing):
    """An equal vector is no tied head; `from_pretrained` would make what is missing at random."""
    tensors = tensors_of({NAME: random_layer()}) | {"embed.weight": torch.ones(2, 2)}
    tensors |= {"norm.weight": torch.ones(2), "other_norm.weight": torch.ones(2)}
    description = described({NAME: random_layer()}, digests(tensors))
    del tensors[missing]
    written(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"the files lack {missing} \(1 in all\)"):
        check_headers(tmp_path, description)


def test_tensors_outside_of_the_pruned_modules_need_no_digest(tmp_path):
    tensors = tensors_of({NAME: random_layer()})
    description = described({NAME: random_layer()}, digests(tensors))
    tensors["renamed.scale"] = tensors.pop("model.scale")  # as transformers does when it saves some families
    assert verify([written(tmp_path, tensors)], description).digests


def test_a_bias_that_has_a_digest_is_needed(tmp_path):
    tensors = tensors_of({NAME: random_layer()})
    description = described({NAME: random_layer()}, digests(tensors))
    del tensors[f"{NAME}.bias"]
    with pytest.raises(ValueError, match=rf"lack {NAME}\.bias, which the pruned module {NAME} needs"):
        verify([written(tmp_path, tensors)], description)
