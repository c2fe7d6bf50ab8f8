"""Version 3: modules whose kept values are whole numbers, described strictly and verified."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from armorfact_hf.checkpoint.description import Description, digests
from armorfact_hf.checkpoint.verify import verify
from armorfact_hf.layers.cuts import Share
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.strategies.strategy import PAIR
from armorfact_hf.vllm.parts import Part
from tests.hf.checkpoint.cases import NAME, config, described, entry, random_layer, tensors_of, written
from tests.hf.layers.cases import int8_layer, whole_layer

SMALL = {"d_out": 16, "d_in": 24, "block": (8, 12)}


def version_3(**changes):
    return config(version=3, modules=[entry(core_dtype="int8", **changes), entry(name="other", block=None)])


def version_4(**changes):
    whole = {"core_dtype": "int8", "wrapper_dtype": "int8", **changes}
    return config(version=4, modules=[entry(**whole), entry(name="other", block=None)])


def int8_model(made=int8_layer):
    layers = {NAME: made(**SMALL), "other": random_layer()}
    found = described(layers)
    modules = found.modules | {NAME: replace(layers[NAME].layout, name=NAME)}
    return tensors_of(layers), replace(found, modules=modules)


def test_it_comes_back_as_it_was_written_beside_other_modules():
    description = Description.from_dict(json.loads(json.dumps(version_3())), "folder")
    assert description.to_dict() == version_3()
    layer = description.modules[NAME]
    assert (layer.core_dtype, description.modules["other"].core_dtype) == ("int8", None)
    assert layer.nbytes(torch.bfloat16) == replace(layer, core_dtype=None).nbytes(torch.bfloat16) - 16 * 12


def test_wrappers_in_int8_are_version_4_and_so_are_int8_cores_of_experts():
    description = Description.from_dict(json.loads(json.dumps(version_4())), "folder")
    assert description.to_dict() == version_4()
    layer = description.modules[NAME]
    plain = replace(layer, wrapper_dtype=None).nbytes(torch.bfloat16)
    (d_out, d_in), (b_out, b_in) = layer.shape, layer.block
    assert layer.nbytes(torch.bfloat16) == plain - (d_out * b_out + d_in * b_in) + 2 * 2 * (d_out + d_in)
    experts = config(version=4, modules=[entry(core_dtype="int8", experts=4)])
    assert Description.from_dict(experts, "folder").to_dict() == experts


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (version_3(block=None), f"module {NAME}: expected no core_dtype without blocks"),
        (version_3(experts=4), "modules: expected no core_dtype of experts in version 3"),
        (version_3(wrapper_dtype="int8"), "expected only the keys name, shape, block, experts, core_dtype, got"),
        (version_4(core_dtype=None), "expected core_dtype to be a name, got None"),
        (version_4(wrapper_dtype=None), "expected wrapper_dtype to be a name, got None"),
        (version_4(wrapper_dtype="int4"), "expected a wrapper_dtype of int8, got 'int4'"),
        (version_4(experts=4), f"module {NAME}: expected no wrapper_dtype of experts"),
        (
            config(version=4, modules=[entry(wrapper_dtype="int8")]),
            f"module {NAME}: expected no wrapper_dtype around a core that has none",
        ),
        (config(version=3, modules=[entry(core_dtype="int4")]), "expected a core_dtype of int8, got 'int4'"),
        (config(version=3, modules=[entry(core_dtype=["int8"])]), "expected a core_dtype of int8, got ['int8']"),
        (config(version=3, modules=[entry(core_dtype=None)]), "expected core_dtype to be a name, got None"),
        (config(version=2, modules=[entry(core_dtype="int8")]), "expected only the keys name, shape, block, experts"),
        (config(version=1, modules=[entry(core_dtype="int8")]), "expected only the keys name, shape, block"),
    ],
)
def test_what_is_malformed_is_refused_with_the_reason(found, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Description.from_dict(found, "folder")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("made", [int8_layer, whole_layer])
def test_whole_files_are_verified(made, tmp_path):
    tensors, description = int8_model(made)
    held = verify([written(tmp_path, tensors)], replace(description, sha256=digests(tensors)))
    assert held.dtypes == {NAME: torch.float32, "other": torch.float32}
    assert held.bytes[NAME] == description.modules[NAME].nbytes(torch.float32)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("values", lambda t: t.float(), "values is F32, expected I8"),
        ("values", lambda t: t.view(torch.uint8), "values is U8, expected I8"),
        ("values", lambda t: t[:, :6].contiguous(), "holds fewer than 2 values in a group of 4"),
        ("left", lambda t: t.to(torch.int8), "left is I8, expected F16 or BF16 or F32 or F64"),
        ("right", lambda t: t.half(), "right is F16, expected F32"),
        ("bias", lambda t: t.bfloat16(), "bias is BF16, expected F32"),
    ],
)
def test_every_damage_is_named(part, change, message, tmp_path):
    tensors, description = int8_model()
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
    with pytest.raises(ValueError, match=message):
        verify([written(tmp_path, tensors)], description)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("left", lambda t: t.float(), "left is F32, expected I8"),
        ("right_scales", lambda t: t.half(), "right_scales is F16, expected F32"),
        ("left_scales", lambda t: t.to(torch.int8), "left_scales is I8, expected F16 or BF16 or F32 or F64"),
        ("left_scales", lambda t: t[:1].contiguous(), r"has shape \[1, 16\], expected \[2, 16\]"),
        ("right_scales", lambda t: t * torch.nan, "right_scales holds 48 values that are NaN or infinite"),
    ],
)
def test_every_damage_of_scales_is_named(part, change, message, tmp_path):
    tensors, description = int8_model(whole_layer)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
    with pytest.raises(ValueError, match=message):
        verify([written(tmp_path, tensors)], description)


def test_whole_numbers_that_are_not_described_are_refused(tmp_path):
    tensors, description = int8_model()
    plain = replace(description.modules[NAME], core_dtype=None)
    with pytest.raises(ValueError, match="values is I8, expected F16 or BF16 or F32 or F64"):
        verify([written(tmp_path, tensors)], replace(description, modules=description.modules | {NAME: plain}))


@pytest.mark.parametrize(("made", "wrappers"), [(int8_layer, None), (whole_layer, "int8")])
def test_a_server_takes_its_share_of_an_int8_layer(made, wrappers):
    layer, stored = made(bias=False, **SMALL), LayerFormat(NAME, (16, 24), PAIR, (8, 12), None, "int8", wrappers)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    rows = [_filled(Part(NAME, Share.of_rows((16, 24), rank, 2), torch.float32, stored), layer) for rank in range(2)]
    torch.testing.assert_close(torch.cat([part(x) for part in rows], dim=-1), layer(x), rtol=1e-4, atol=1e-4)
    whole = LayerFormat(NAME, (16, 96), PAIR, (8, 12), None, "int8", wrappers)
    wide, x = made(16, 96, (8, 12), bias=False), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    shares = [Share.of_columns((16, 96), rank, 2) for rank in range(2)]
    parts = [_filled(Part(NAME, share, torch.float32, whole), wide) for share in shares]
    halves = [part(half) for part, half in zip(parts, x.split(48, dim=1), strict=True)]
    torch.testing.assert_close(sum(halves), wide(x), rtol=1e-4, atol=1e-4)


def _filled(part: Part, layer):
    for name, tensor in layer.state_dict().items():
        with pytest.raises(ValueError, match="expected"):
            part.load(name, tensor.to(torch.int8) if tensor.is_floating_point() else tensor.double())
        part.load(name, tensor)
    assert not part.missing
    assert part.module.values.dtype == torch.int8
    return part.module
