"""Bytes, headers and digests changed at random are noticed or of no effect."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from armorfact import Core, Pattern
from armorfact_hf.checkpoint.description import Description, digests, tensor_digest
from armorfact_hf.checkpoint.verify import verify
from armorfact_hf.layers.format import LayerFormat
from tests.hf.checkpoint.cases import (
    JUNK,
    NAME,
    SETTINGS,
    described,
    file_of,
    header_of,
    mutate_,
    random_layer,
    tensors_of,
)


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
