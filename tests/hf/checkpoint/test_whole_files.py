"""What a layer saves is accepted, in one file or several."""

from __future__ import annotations

import itertools

import pytest
import torch

import armorfact_hf.checkpoint.contents
from armorfact import Core, Pattern
from armorfact.packed import pack_positions
from armorfact_hf.checkpoint.description import digests
from armorfact_hf.checkpoint.shards import INDEX, shards
from armorfact_hf.checkpoint.verify import verify, verify_folder
from tests.hf.checkpoint.cases import NAME, described, random_layer, sharded, tensors_of, written


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
