"""The format of pruned models: descriptions come back as written, whole files pass, and every damage is named."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

import armorfact_hf.checkpoint.contents
from armorfact import BlockDiagonal, Core, Pattern
from armorfact.packed import pack_positions
from armorfact_hf.checkpoint.description import Description, NotPruned, digests, tensor_digest
from armorfact_hf.checkpoint.verify import INDEX, shards, verify, verify_folder
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear

NAME = "model.layers.0.q_proj"
SETTINGS = {"deadline": None, "derandomize": True}


def random_layer(pattern="2:4", block=(8, 12), bias=True, dtype=torch.float32, shape=(16, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    pattern = Pattern.parse(pattern)
    weight = draw(shape)
    core = Core.from_dense(weight * pattern.top_mask(weight.abs()), pattern)
    left, right = (
        (None, None)
        if block is None
        else (BlockDiagonal(draw(d // b, b, b)) for d, b in zip(shape, block, strict=True))
    )
    return FactorizedLinear.of(core, left, right, draw(shape[0]) if bias else None).to(dtype)


def described(layers: dict[str, FactorizedLinear], sha256=None) -> Description:
    pattern = next(iter(layers.values())).pattern
    modules = {
        name: LayerFormat(name, (layer.out_features, layer.in_features), pattern, layer.block)
        for name, layer in layers.items()
    }
    return Description(pattern, "float32", modules, {"method": "armorfact"}, sha256 or {})


def tensors_of(layers: dict[str, FactorizedLinear]) -> dict[str, torch.Tensor]:
    held = {f"{name}.{part}": tensor for name, layer in layers.items() for part, tensor in layer.state_dict().items()}
    return {**held, "model.norm.weight": torch.ones(3), "model.scale": torch.tensor(0.5)}


def written(folder: Path, tensors, name="model.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def header_of(data: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def file_of(header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# What config.json says


def entry(**changes):
    return {"name": NAME, "shape": [16, 24], "block": [8, 12]} | changes


def config(**changes):
    modules = [entry(), entry(name="model.layers.0.k_proj", block=None)]
    found = {"quant_method": "armorfact", "version": 1, "pattern": "2:4", "dtype": "bfloat16", "modules": modules}
    sha256 = {f"{NAME}.values": "0123456789abcdef" * 4, "model.scale": "0" * 64}
    return found | {"prune": {"method": "armorfact", "sweeps": 20}, "sha256": sha256} | changes


def test_a_description_comes_back_as_it_was_written():
    description = Description.from_dict(json.loads(json.dumps(config())), "folder")
    assert description.to_dict() == config()
    assert Description.from_dict(description.to_dict(), "folder") == description
    assert list(description.modules) == [NAME, "model.layers.0.k_proj"]
    layer = description.modules[NAME]
    assert layer == LayerFormat(NAME, (16, 24), Pattern(2, 4), (8, 12))
    assert layer.tensors == {"values": (16, 12), "positions": (16, 3), "left": (2, 8, 8), "right": (2, 12, 12)}


def test_the_settings_of_the_run_and_the_digests_may_be_absent():
    found = config()
    del found["prune"], found["sha256"]
    description = Description.from_dict(found, "folder")
    assert description.prune == {} and description.sha256 == {}
    assert description.to_dict() == found | {"prune": {}}


@pytest.mark.parametrize("found", [None, 3, [], {}, config(quant_method="gptq"), config(quant_method=None)])
def test_what_armorfact_did_not_write_is_told_apart(found):
    with pytest.raises(NotPruned, match=r"folder holds no model pruned by armorfact; `armorfact prune` makes one"):
        Description.from_dict(found, "folder")


MALFORMED = [
    (config(version=2), "version 2 of the format, this armorfact reads version 1: install the version"),
    (config(version=True), "version True"),
    (config(version=1.0), "version 1.0"),
    (config(extra=1), "got ['extra']"),
    ({key: value for key, value in config().items() if key != "dtype"}, "none named dtype"),
    (config(dtype="int8"), "dtype: expected one of float16, bfloat16, float32, float64, got 'int8'"),
    (config(dtype=["float16"]), "dtype: expected one of"),
    (config(pattern="4:2"), "4:2"),
    (config(pattern=" 2:4"), "pattern: expected 'N:M' such as '2:4', got ' 2:4'"),
    (config(pattern="50000000:100000000"), "pattern: expected"),
    (config(pattern="500:999"), "supports"),
    (config(pattern="٢:٤"), "pattern: expected"),
    (config(pattern=None), "pattern: expected"),
    (config(prune=[]), "prune: expected an object"),
    (config(sha256=None), "sha256: expected an object of a digest for each tensor, or nothing, got None"),
    (config(sha256=["0" * 64]), "sha256: expected an object"),
    (config(sha256={"a.b": 3}), "sha256: expected 64 lower-case hexadecimal digits for tensor a.b, got 3"),
    (config(sha256={"a.b": "0" * 63}), "digits for tensor a.b, got '0000"),
    (config(sha256={"a.b": "0" * 65}), "digits for tensor a.b, got '0000"),
    (config(sha256={"a.b": "0" * 64 + "\n"}), "digits for tensor a.b, got '0000"),
    (config(sha256={"a.b": "A" * 64}), "digits for tensor a.b, got 'AAAA"),
    (config(sha256={"a.b": "٢" * 64}), "digits for tensor a.b"),
    (config(sha256={5: "0" * 64}), "sha256: expected names of tensors, got 5"),
    (config(modules={}), "modules: expected a list"),
    (config(modules=[]), "modules: expected a list of at least one"),
    (config(modules=[3]), "modules[0]: expected an object"),
    (config(modules=[entry(name="")]), "modules[0]: expected the name of a module, got ''"),
    (config(modules=[entry(name=5)]), "modules[0]: expected the name of a module, got 5"),
    (config(modules=[entry(), entry()]), f"module {NAME}: expected one entry of that name"),
    (config(modules=[entry(bias=True)]), f"module {NAME}: expected only the keys"),
    (config(modules=[{"name": NAME, "shape": [4, 4]}]), f"module {NAME}: expected the keys name, shape, block"),
    (config(modules=[entry(shape=[16])]), f"module {NAME}: expected shape [d_out, d_in] to be two whole numbers"),
    (config(modules=[entry(shape="16")]), f"module {NAME}: expected shape"),
    (config(modules=[entry(shape=[16, -24])]), "got [16, -24]"),
    (config(modules=[entry(shape=[0, 24])]), "got [0, 24]"),
    (config(modules=[entry(shape=[16, 24.0])]), "got [16, 24.0]"),
    (config(modules=[entry(shape=[True, 24])]), "got [True, 24]"),
    (config(modules=[entry(shape=["16", 24])]), "got ['16', 24]"),
    (config(modules=[entry(shape=[16, 1 << 40])]), "from 1 to 16777216"),
    (config(modules=[entry(shape=[16, 10**4000])]), "from 1 to 16777216"),
    (config(modules=[entry(shape=[16, 26])]), "a multiple of 4 for pattern 2:4, got shape [16, 26]"),
    (config(modules=[entry(block=[8, 0])]), f"module {NAME}: expected block [b_out, b_in] to be whole numbers"),
    (config(modules=[entry(block=8)]), "expected block [b_out, b_in] to be two whole numbers, got 8"),
    (config(modules=[entry(block=[8, 16])]), "a block that divides shape [16, 24], got block [8, 16]"),
]


@pytest.mark.parametrize(("found", "sentence"), MALFORMED)
def test_a_malformed_description_is_refused_with_the_reason(found, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Description.from_dict(found, "folder")
    assert sentence in str(caught.value) and str(caught.value).startswith("folder")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([NAME, "2:4", 4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def mutate_(data, node):
    """Replace, remove or add one value somewhere inside of a nest of dictionaries and lists."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
            break
        node = node[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if key is not None and action == "remove":
        del node[key]
    elif key is not None and action == "replace":
        node[key] = data.draw(JUNK)
    elif isinstance(node, dict):
        node[data.draw(st.text(max_size=4))] = data.draw(JUNK)
    else:
        node.append(data.draw(JUNK))


@settings(max_examples=500, **SETTINGS)
@given(st.data())
def test_a_description_with_values_at_random_is_refused_or_means_what_it_says(data):
    found = copy.deepcopy(config())
    for _ in range(data.draw(st.integers(1, 3))):
        mutate_(data, found)
    try:
        description = Description.from_dict(found, "folder")
    except ValueError:
        return
    read = {"sha256": {}} | description.to_dict()
    assert repr({key: read[key] for key in config()}) == repr({key: found.get(key, {}) for key in config()})


# Digests


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


# Whole files


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "2:8", "1:3", "2:5"])
@pytest.mark.parametrize("block", [None, (8, 15)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_a_layer_saves_is_accepted(tmp_path, pattern, block, bias, dtype):
    columns = Pattern.parse(pattern).group * 15  # no whole number of bytes in a row for most patterns
    layer = random_layer(pattern, block, bias, dtype, (16, columns))
    layers = {NAME: layer, "model.layers.1.q_proj": random_layer(pattern, None, False, dtype, (8, columns))}
    tensors = tensors_of(layers)
    path = written(tmp_path, tensors)
    for sha256 in ({}, digests(tensors)):
        verified = verify([path], described(layers, sha256))
        assert verified.bytes[NAME] == layer.nbytes - (layer.bias.nbytes if bias else 0)
        assert verified.dtypes == dict.fromkeys(layers, dtype)
        assert verified.digests == bool(sha256)


@pytest.mark.parametrize(
    ("pattern", "columns"), [("2:4", 8), ("2:4", 4), ("1:4", 12), ("1:3", 9), ("2:8", 8), ("1:2", 6)]
)
def test_a_byte_of_positions_is_accepted_exactly_if_it_can_occur(tmp_path, pattern, columns):
    layer = random_layer(pattern, None, False, shape=(3, columns))
    supports = itertools.product(layer.pattern.supports, repeat=columns // layer.pattern.group)
    rows = torch.tensor([list(itertools.chain(*row)) for row in supports])
    possible = set(pack_positions(rows, layer.pattern.index_bits).flatten().tolist())
    for byte in range(256):
        layer.positions[1] = byte
        path = written(tmp_path, tensors_of({NAME: layer}))
        if byte in possible:
            verify([path], described({NAME: layer}))
        else:
            with pytest.raises(ValueError, match=f"{NAME}.positions"):
                verify([path], described({NAME: layer}))


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 8), ("2:4", 12), ("1:4", 12), ("1:3", 9), ("2:8", 8)])
def test_positions_are_judged_by_their_bytes_where_groups_fit_one(tmp_path, monkeypatch, pattern, columns):
    layer = random_layer(pattern, None, False, shape=(3, columns))
    monkeypatch.delattr(armorfact_hf.checkpoint.contents, "_check_positions")  # the slow way
    verify([written(tmp_path, tensors_of({NAME: layer}))], described({NAME: layer}))


def test_the_row_that_the_documentation_works_out():
    row = torch.tensor([[0.0, 5, 0, -1, 2, 3, 0, 0, 0, 0, 4, 7]])
    core = Core.from_dense(row, Pattern(2, 4))
    assert core.values.tolist() == [[5, -1, 2, 3, 4, 7]] and core.packed.tolist() == [[0x4D, 0x0E]]


def test_the_tensors_of_a_model_may_lie_in_several_files(tmp_path):
    tensors = tensors_of({NAME: random_layer()})
    description = described({NAME: random_layer()}, digests(tensors))
    names = sharded(tmp_path, tensors)
    assert [path.name for path in shards(tmp_path)] == sorted(set(names.values()))
    assert verify_folder(tmp_path, description).digests
    (tmp_path / INDEX).unlink()
    assert verify_folder(tmp_path, description).bytes == verify(shards(tmp_path), description).bytes


def sharded(folder: Path, tensors) -> dict[str, str]:
    """Write a file for each of two halves, and the index; returns its weight map."""
    names = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        written(folder, part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    return names


# Damage, by the part of the module that it strikes


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
    sha256 = digests({**tensors, "lm_head.weight": torch.ones(2)})  # tied to the embedding
    assert verify([written(tmp_path, tensors)], described({NAME: random_layer()}, sha256)).digests


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


# The folder


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "c:\\x", 5, [1]]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, outside):
    names = sharded(tmp_path, tensors_of({NAME: random_layer()}))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names | {"model.scale": outside}}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{INDEX} (lists .*expected names of files in its own folder|is damaged)"):
        verify_folder(tmp_path, described({NAME: random_layer()}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": 3}', "[" * 100_000, "\ud800"])
def test_a_damaged_index_is_named(tmp_path, text):
    sharded(tmp_path, tensors_of({NAME: random_layer()}))
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        verify_folder(tmp_path, described({NAME: random_layer()}))


@pytest.mark.parametrize("change", ["moved", "listed only", "found only"])
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path, change):
    names = sharded(tmp_path, tensors_of({NAME: random_layer()}))
    other = next(file for file in names.values() if file != names["model.scale"])
    changed = {
        "moved": names | {"model.scale": other},
        "listed only": names | {"model.other": other},
        "found only": {name: file for name, file in names.items() if name != "model.scale"},
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": changed[change]}), encoding="utf-8")
    name = "model.other" if change == "listed only" else "model.scale"
    with pytest.raises(ValueError, match=f"disagree on tensor {name}"):
        verify_folder(tmp_path, described({NAME: random_layer()}))


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
    names = sharded(tmp_path, tensors_of({NAME: random_layer()}))
    (tmp_path / names["model.scale"]).unlink()
    with pytest.raises(ValueError, match=f"lacks {names['model.scale']}, which its index lists"):
        shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "n" * 300}}), encoding="utf-8")
    with pytest.raises(ValueError, match="expected names of files"):
        shards(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors file"):
        shards(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"abc", b"\xff" * 64, struct.pack("<Q", 99_999_999) + b"{}"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cannot be read .*download it again"):
        verify([path], described({NAME: random_layer()}))


# Damage at random


@functools.cache
def whole_file() -> tuple[dict[str, torch.Tensor], bytes]:
    """Tensors of a small model, and the file that holds them."""
    tensors = tensors_of({NAME: random_layer(dtype=torch.float16, shape=(8, 24))})
    return tensors, save(tensors)


@functools.cache
def description_of_it(guarded: bool) -> Description:
    """What config.json says of `whole_file`, with or without digests."""
    return described({NAME: random_layer(shape=(8, 24))}, digests(whole_file()[0]) if guarded else {})


def accepted(folder: Path, content: bytes, guarded: bool = True) -> dict[str, torch.Tensor] | None:
    """The tensors that a file must hold if it passes, or None; with digests they are those written, bit for bit."""
    path = folder / "fuzzed.safetensors"
    path.write_bytes(content)
    description = description_of_it(guarded)
    try:
        verify([path], description)
    except ValueError:
        return None
    needed = {f"{NAME}.{part}": shape for part, shape in description.modules[NAME].tensors.items()}
    with safe_open(path, "pt") as stored:
        listed = set(stored.keys()) & description.sha256.keys()
        read = {name: stored.get_tensor(name) for name in {*needed, *listed}}
    if guarded:
        assert {name for name in whole_file()[0] if name.startswith(NAME)} <= listed
        assert_same(read)
    for name, shape in needed.items():
        assert tuple(read[name].shape) == shape and read[name].isfinite().all()
    assert torch.equal(repacked(read), read[f"{NAME}.positions"])
    return read


def repacked(read: dict[str, torch.Tensor]) -> torch.Tensor:
    """The positions of a core that holds no stored zero, worked out again from its dense matrix."""
    values = torch.ones_like(read[f"{NAME}.values"])
    core = Core(values, read[f"{NAME}.positions"], Pattern(2, 4), 24)
    return Core.from_dense(core.dense(), core.pattern).packed


def assert_same(read: dict[str, torch.Tensor]) -> None:
    tensors, _ = whole_file()
    for name, tensor in read.items():
        assert tensor.dtype == tensors[name].dtype and tensor_digest(tensor) == tensor_digest(tensors[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def test_the_files_that_are_damaged_below_pass_when_whole(folder):
    for guarded in (True, False):
        assert_same(accepted(folder, whole_file()[1], guarded))


@settings(max_examples=600, **SETTINGS)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_byte_that_changed_is_noticed_or_of_no_effect(folder, place, flip):
    content = bytearray(whole_file()[1])
    content[int(place * len(content))] ^= flip
    accepted(folder, bytes(content))  # compares, if it passes


@pytest.mark.parametrize("guarded", [True, False])
@settings(max_examples=300, **SETTINGS)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_many_bytes_that_changed_never_break_the_reader(folder, guarded, changes):
    content = bytearray(whole_file()[1])
    for place, value in changes:
        content[int(place * len(content))] = value
    accepted(folder, bytes(content), guarded)


@settings(max_examples=200, **SETTINGS)
@given(keep=st.floats(0, 1, exclude_max=True), more=st.binary(min_size=1, max_size=20), guarded=st.booleans())
def test_a_file_cut_short_or_grown_is_refused(folder, keep, more, guarded):
    _, content = whole_file()
    assert accepted(folder, content[: int(keep * len(content))], guarded) is None
    assert accepted(folder, content + more, guarded) is None


SIZES = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 8, 12, 16, 24, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1])
DTYPES = st.sampled_from(["F16", "BF16", "F32", "I16", "U8", "I8", "BOOL", "F4", "F6_E2M3", "F8_E8M0", "C64", "", "X"])
NAMES = st.sampled_from([f"{NAME}.values", f"{NAME}.bias", f"{NAME}.weight", NAME, "", "model.norm.bias", "a.b\0"])
FIELDS = {
    "dtype": DTYPES | JUNK,
    "shape": st.lists(SIZES, max_size=4) | JUNK,
    "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JUNK,
}


@pytest.mark.parametrize("guarded", [True, False])
@settings(max_examples=500, **SETTINGS)
@given(data=st.data())
def test_a_header_with_values_at_random_never_breaks_the_reader(folder, guarded, data):
    header, body = header_of(whole_file()[1])
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*sorted(name for name in header if name != "__metadata__"), "__metadata__"]))
        field = data.draw(st.sampled_from([*FIELDS, "name", "entry"]))
        if name == "__metadata__" or field == "entry":
            header[name] = data.draw(JUNK)
        elif field == "name":
            header[data.draw(NAMES)] = header.pop(name)
        elif isinstance(header[name], dict):
            header[name][field] = data.draw(FIELDS[field])
    accepted(folder, file_of(header, body), guarded)


@settings(max_examples=300, **SETTINGS)
@given(data=st.data())
def test_digests_at_random_are_refused_or_those_of_the_file(folder, data):
    path = folder / "model.safetensors"
    path.write_bytes(whole_file()[1])
    found = description_of_it(True).to_dict()
    for _ in range(data.draw(st.integers(1, 2))):
        mutate_(data, found["sha256"])
    try:
        description = Description.from_dict(found, "folder")
        verify([path], description)
    except ValueError:
        return
    right = digests(whole_file()[0])
    assert all(right.get(name, digest) == digest for name, digest in description.sha256.items())
    modules = {name for name in right if name.startswith(NAME)}
    assert not description.sha256 or modules <= description.sha256.keys()


@pytest.mark.parametrize("name", [f"{NAME}.values", f"{NAME}.positions", f"{NAME}.left", "model.norm.weight"])
@pytest.mark.parametrize("sizes", [[1 << 20, 1 << 22], [1 << 40, 1 << 40], [0, 1 << 62], [0, (1 << 64) - 1]])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_tensor_that_claims_terabytes_is_refused_before_any_is_read(folder, name, sizes, guarded):
    header, body = header_of(whole_file()[1])
    start = header[name]["data_offsets"][0]
    header[name] |= {"shape": sizes, "data_offsets": [start, start + sizes[0] * sizes[1] * 2]}
    assert accepted(folder, file_of(header, body), guarded) is None


def test_a_description_that_claims_terabytes_is_refused_before_any_is_read(folder):
    path = folder / "model.safetensors"
    path.write_bytes(whole_file()[1])
    huge = LayerFormat(NAME, (1 << 24, 1 << 24), Pattern(2, 4), (1 << 24, 1 << 24))
    with pytest.raises(ValueError, match=rf"{NAME}\.\w+ .*expected \["):
        verify([path], Description(Pattern(2, 4), "float16", {NAME: huge}, {}))
