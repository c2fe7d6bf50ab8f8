"""The shares of several ranks make the whole product, whichever way a layer is cut; other cuts are refused."""

from __future__ import annotations

import pytest
import torch

from armorfact import Pattern
from armorfact_hf.layers.cuts import Share, part_of, pieces, refusal_to_cut
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.checkpoint.cases import random_layer

PATTERNS = ["2:4", "1:4", "4:8"]


def stored_as(layer: FactorizedLinear, name: str = "layer") -> LayerFormat:
    return LayerFormat(name, (layer.out_features, layer.in_features), layer.pattern, layer.block)


def held(layer: FactorizedLinear, share: Share) -> FactorizedLinear:
    """What one rank makes of its share."""
    whole = stored_as(layer)
    local = share.of_format(whole)
    part = FactorizedLinear(*local.shape, local.pattern, local.block)
    for name, tensor in part.state_dict().items():
        tensor.copy_(share.of_factor(whole, name, layer.state_dict()[name]))
    return part


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [(8, 16), None], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cut_by_rows_the_outputs_are_beside_each_other(pattern, block, ranks):
    layer = random_layer(pattern, block, bias=False, shape=(32, 64))
    x = torch.randn(3, 64)
    shares = [Share.of_rows((32, 64), rank, ranks) for rank in range(ranks)]
    found = torch.cat([held(layer, share)(x) for share in shares], dim=-1)
    torch.testing.assert_close(found, layer(x))
    torch.testing.assert_close(torch.cat([share.of_weight(layer.weight) for share in shares]), layer.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [(8, 16), None], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cut_by_columns_the_outputs_sum_up(pattern, block, ranks):
    layer = random_layer(pattern, block, bias=False, shape=(32, 64))
    x = torch.randn(3, 64)
    parts = [(Share.of_columns((32, 64), rank, ranks), part) for rank, part in enumerate(x.chunk(ranks, dim=-1))]
    found = sum(held(layer, share)(part) for share, part in parts)
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)
    weights = [share.of_weight(layer.weight) for share, _ in parts]
    torch.testing.assert_close(torch.cat(weights, dim=1), layer.weight)


def test_a_layer_of_several_outputs_is_cut_in_each():
    """As a fused attention projection is: 32 rows of queries, 16 of keys, and as many of values."""
    layer = random_layer("2:4", (8, 16), bias=False, shape=(64, 64))
    x = torch.randn(3, 64)
    for rank in range(2):
        rows = tuple(part_of(piece, rank, 2) for piece in pieces([32, 16, 16]))
        expected = torch.cat([layer(x)[:, part.start : part.stop] for part in rows], dim=-1)
        torch.testing.assert_close(held(layer, Share((64, 64), rows, range(64), 2))(x), expected)


@pytest.mark.parametrize(
    ("share", "block", "message"),
    [
        (Share.of_rows((24, 64), 1, 2), (8, 16), r"rows 12 to 24 of 24, which cuts a block of A of 8 rows"),
        (Share.of_columns((24, 96), 0, 4), (8, 16), r"columns 0 to 24 of 96, which cuts a block of B of 16 columns"),
        (Share.of_columns((24, 24), 1, 4), None, r"columns 6 to 12 of 24, which cuts a group of 4 columns"),
        (Share.of_columns((24, 24), 0, 2), None, r"columns 0 to 12 of 24, which cuts a byte of positions in two"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused_with_the_way_out(share, block, message):
    layer = LayerFormat("model.o_proj", share.whole, Pattern(2, 4), block)
    with pytest.raises(ValueError, match=rf"^model.o_proj: .*{message}.* --tensor-parallel {share.ranks}`"):
        share.of_format(layer)


def test_a_layer_of_another_shape_is_refused():
    layer = LayerFormat("model.o_proj", (24, 64), Pattern(2, 4), None)
    with pytest.raises(ValueError, match=r"the model has shape \[24, 32\] there, config.json says \[24, 64\]"):
        Share.all_of((24, 32)).of_format(layer)


@pytest.mark.parametrize(
    ("shape", "block", "ranks", "message"),
    [
        ((32, 64), (8, 8), 2, None),
        ((32, 64), (8, 8), 3, "cannot be cut into 3 equal parts"),
        ((32, 64), (32, 32), 2, "a block of A of 32 rows"),
        ((64, 32), (32, 32), 2, "a block of B of 32 columns"),
        ((32, 8), None, 2, "a byte of positions"),
        ((32, 8), None, 1, None),
    ],
)
def test_a_layer_is_fit_if_both_ways_to_cut_it_are(shape, block, ranks, message):
    found = refusal_to_cut(LayerFormat("layer", shape, Pattern(2, 4), block), ranks)
    assert message in found if message else found is None


def test_bytes_are_those_of_the_tensors():
    layer = random_layer("2:4", (8, 12), bias=False, dtype=torch.bfloat16)
    assert stored_as(layer).nbytes(torch.bfloat16) == layer.nbytes
