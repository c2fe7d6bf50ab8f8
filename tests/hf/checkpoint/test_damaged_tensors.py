"""Every damage to a tensor of a pruned module is named."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save

import armorfact_hf.checkpoint.contents
from armorfact import Pattern
from armorfact.packed import pack_positions
from armorfact_hf.checkpoint.description import digests
from armorfact_hf.checkpoint.verify import verify
from tests.hf.checkpoint.cases import NAME, described, file_of, header_of, random_layer, tensors_of, written


def packed(*groups, rows=16, bits=2):
    return pack_positions(torch.tensor([list(itertools.chain(*groups))] * rows), bits)


def put(part, change):
    def apply(tensors):
        tensors[f"{NAME}.{part}"] = change(tensors.get(f"{NAME}.{part}"))

    return apply


def set_to(value, *place):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def cast(dtype):
    return lambda tensor: tensor.to(dtype)


GOOD = [(0, 1)] * 5
TENSORS = {
    "more than N": ("values", lambda t: torch.cat([t, t], 1), "holds more than 2 values in a group of 4"),
    "fewer than N": ("values", lambda t: t[:, :6].contiguous(), "holds fewer than 2 values in a group of 4"),
    "rows": ("values", lambda t: t[:8].contiguous(), "has shape [8, 12], expected [16, 12]"),
    "rank": ("left", lambda t: t.reshape(16, 8), "has shape [16, 8], expected [2, 8, 8]"),
    "wrong block": ("right", lambda t: t.reshape(4, 12, 6), "expected [2, 12, 12] in a module of shape [16, 24]"),
    "bias": ("bias", lambda t: t[:3].contiguous(), "has shape [3], expected [16]"),
    "bytes": ("positions", lambda t: t[:, :2].contiguous(), "has shape [16, 2], expected [16, 3]"),
    "weight": ("weight", lambda _: torch.zeros(16, 24), "is unexpected"),
    "deeper": ("inner.values", lambda _: torch.zeros(2), "is unexpected"),
    "integer values": ("values", cast(torch.int32), "is I32, expected F16 or BF16 or F32 or F64"),
    "mixed": ("right", cast(torch.bfloat16), "is BF16, expected F32"),
    "mixed bias": ("bias", cast(torch.float64), "is F64, expected F32"),
    "signed": ("positions", cast(torch.int8), "is I8, expected U8"),
    "nan": ("values", set_to(float("nan"), slice(2), 3), "holds 2 values that are NaN or infinite"),
    "inf": ("left", set_to(float("inf"), 1, 2, 3), "holds 1 values that are NaN or infinite"),
    "minus inf": ("right", set_to(-float("inf"), 0, 0), "holds 12 values that are NaN or infinite"),
    "nan bias": ("bias", set_to(float("nan"), 0), "holds 1 values that are NaN or infinite"),
    "twice": ("positions", set_to(packed((0, 1), (2, 2))[0, 0], 5, 1), "group 3 of row 5 keeps fewer than 2 of 4"),
    "descending": ("positions", set_to(packed((3, 1), (0, 1))[0, 0], 9, 0), "group 0 of row 9 has positions [3, 1]"),
}


@pytest.mark.parametrize(("part", "change", "sentence"), TENSORS.values(), ids=TENSORS)
def test_a_wrong_tensor_is_named_with_its_fault(tmp_path, part, change, sentence):
    tensors = tensors_of({NAME: random_layer()})
    put(part, change)(tensors)
    path = written(tmp_path, tensors)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        verify([path], described({NAME: random_layer()}))
    assert str(caught.value).startswith(f"{path}: tensor {NAME}.{part} ") or f"{NAME}.{part}: " in str(caught.value)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "groups", "sentence"),
    [
        ("2:4", GOOD, "unused high bits"),
        ("1:3", [(0,), (3,), (1,), (0,), (2,)], "group 1 of row 0 has positions [3], expected numbers below 3"),
        ("2:5", [(0, 4), (0, 1), (4, 5), (0, 1), (0, 1)], "group 2 of row 0 has positions [4, 5], expected numbers"),
        ("3:5", [(0, 1, 2), (4, 1, 4), (0, 1, 2), (0, 1, 2), (0, 1, 2)], "keeps fewer than 3 of 5: a position occurs"),
        ("4:8", [(0, 1, 2, 3)] * 4 + [(0, 2, 1, 3)], "group 4 of row 0 has positions [0, 2, 1, 3], expected them to"),
    ],
)
def test_a_wrong_group_is_found_in_every_pattern(tmp_path, pattern, groups, sentence):
    pattern = Pattern.parse(pattern)
    layer = random_layer(pattern, None, False, shape=(16, 5 * pattern.group))
    layer.positions.copy_(packed(*groups, bits=pattern.index_bits))
    if sentence.startswith("unused"):
        layer.positions[7, -1] |= 128
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        verify([written(tmp_path, tensors_of({NAME: layer}))], described({NAME: layer}))
    assert f"{NAME}.positions" in str(caught.value) and sentence in str(caught.value)


def test_a_wrong_group_is_found_in_every_panel_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(armorfact_hf.checkpoint.contents, "PANEL", 36)  # three rows
    layer = random_layer()
    layer.positions[10, 2] = 0
    with pytest.raises(ValueError, match="group 4 of row 10 keeps fewer than 2 of 4"):
        verify([written(tmp_path, tensors_of({NAME: layer}))], described({NAME: layer}))


def test_wrappers_without_a_block_are_unexpected(tmp_path):
    path = written(tmp_path, tensors_of({NAME: random_layer()}))
    with pytest.raises(ValueError, match=rf"{NAME}\.left is unexpected"):
        verify([path], described({NAME: random_layer(block=None)}))


@pytest.mark.parametrize("part", ["values", "positions", "left", "right"])
def test_a_missing_tensor_is_named(tmp_path, part):
    tensors = tensors_of({NAME: random_layer()})
    del tensors[f"{NAME}.{part}"]
    with pytest.raises(ValueError, match=rf"lack {NAME}\.{part}, which the pruned module {NAME} needs"):
        verify([written(tmp_path, tensors)], described({NAME: random_layer()}))


def test_a_tensor_in_two_files_is_named_with_both(tmp_path):
    tensors = tensors_of({NAME: random_layer()})
    files = [written(tmp_path, tensors, name="a.safetensors")]
    files.append(written(tmp_path, {"model.scale": torch.tensor(1.0)}, name="b.safetensors"))
    with pytest.raises(ValueError, match=r"b\.safetensors: tensor model\.scale is in .*a\.safetensors too"):
        verify(files, described({NAME: random_layer()}))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F4"])
def test_a_dtype_that_no_model_has_is_refused_or_hashed(tmp_path, dtype):
    tensors = tensors_of({NAME: random_layer()})
    header, body = header_of(save(tensors))
    header["model.norm.weight"] |= {"dtype": dtype, "shape": [16 if dtype == "F6_E2M3" else 24]}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, body))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight (cannot be read|is damaged)"):
        verify([path], described({NAME: random_layer()}, digests(tensors)))


def test_an_empty_tensor_of_a_shape_that_cannot_be_is_refused(tmp_path):
    tensors = tensors_of({NAME: random_layer()})
    header, body = header_of(save(tensors))
    header["empty"] = {"dtype": "F32", "shape": [0, (1 << 64) - 1], "data_offsets": [len(body), len(body)]}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, body))
    with pytest.raises(ValueError, match=r"tensor empty cannot be read"):
        verify([path], described({NAME: random_layer()}, digests(tensors) | {"empty": "0" * 64}))
