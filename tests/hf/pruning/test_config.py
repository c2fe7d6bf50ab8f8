"""Settings are checked at once, and survive JSON."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest

import armorfact_hf
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.typed_json import from_json


def test_settings_survive_json():
    config = PruneConfig(block=64, tensor_parallel=4, include=("q_proj", "re:.*mlp.*"), shrinkage=0.5, baselines=())
    assert from_json(PruneConfig, json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_of_numpy_are_those_of_python():
    config = PruneConfig(
        block=np.int64(16), sweeps=np.int32(3), rtol=np.float32(0.5), shrinkage=np.float64(2), baselines=()
    )
    assert config == PruneConfig(block=16, sweeps=3, rtol=0.5, shrinkage=2.0, baselines=())
    assert from_json(PruneConfig, json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_another_version_are_refused():
    with pytest.raises(ValueError, match=r"colour: expected only the keys method, "):
        from_json(PruneConfig, {"colour": "red"})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "lottery"}, ValueError, "armorfact, sparsegpt"),
        ({"pattern": "4:2"}, ValueError, "1 <= N < M"),
        ({"block": 0}, ValueError, "positive number"),
        ({"block": "big"}, ValueError, "'auto' or 'priced', got 'big'"),
        ({"tensor_parallel": 0}, ValueError, "at least 1 rank, got 0"),
        ({"tensor_parallel": 2.0}, ValueError, "whole number of ranks, got 2.0"),
        ({"tensor_parallel": "two"}, ValueError, "whole number of ranks, got 'two'"),
        ({"block": True}, ValueError, "positive number"),
        ({"objective": "hessian"}, ValueError, "gram, normalized, diagonal, nowag"),
        ({"propagate": "both"}, ValueError, "pruned, dense"),
        ({"target": "moon"}, ValueError, "weight, output"),
        ({"init": "armorfact"}, ValueError, "sparsegpt, wanda"),
        ({"sweeps": -1}, ValueError, "sweeps >= 0"),
        ({"sweeps": float("nan")}, ValueError, "sweeps must be a whole number, got nan"),
        ({"sweeps": 2.5}, ValueError, "sweeps must be a whole number, got 2.5"),
        ({"sweeps": True}, ValueError, "sweeps must be a whole number, got True"),
        ({"block": 16.0}, ValueError, "positive number of channels, 'auto' or 'priced', got 16.0"),
        ({"rtol": 1.0}, ValueError, "rtol < 1"),
        ({"rtol": float("nan")}, ValueError, "rtol < 1"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a number, got '1e-3'"),
        ({"shrinkage": "much"}, TypeError, "shrinkage must be a number, got 'much'"),
        ({"shrinkage": -0.5}, ValueError, "finite number >= 0"),
        ({"shrinkage": float("nan")}, ValueError, "finite number >= 0"),
        ({"objective": "diagonal", "shrinkage": 1.0}, ValueError, "does not look at"),
        ({"target": "output", "propagate": "dense"}, ValueError, "propagate='pruned'"),
        ({"target": "output", "objective": "nowag"}, ValueError, "objective='gram'"),
        ({"method": "wanda", "sweeps": 5, "block": 64}, ValueError, "block=64, sweeps=5 would not act: .*'armorfact'"),
        ({"method": "magnitude", "tail": 0}, ValueError, "tail=0 would not act: .*got method='magnitude'"),
        ({"method": "sparsegpt", "shrinkage": 0.5}, ValueError, "shrinkage=0.5 would not act"),
        ({"method": "wanda", "baselines": ("paper",), "block": "priced"}, ValueError, "block='priced' would not act"),
        ({"refine": None, "rate": 0.01}, ValueError, "rate=0.01 would not act: expected refine='block'"),
        ({"passes": 0}, ValueError, "passes >= 1"),
        ({"passes": 1.5}, ValueError, "passes must be a whole number, got 1.5"),
        ({"rate": 0.0}, ValueError, "finite rate > 0"),
        ({"rate": float("inf")}, ValueError, "finite rate > 0"),
        ({"rate": float("nan")}, ValueError, "finite rate > 0"),
        ({"tail": -1}, ValueError, "0 or more, got -1"),
        ({"include": "q_proj"}, TypeError, "tuple of strings"),
        ({"ignore": ("re:(",)}, ValueError, "not a regular expression"),
        ({"baselines": ("luck",)}, ValueError, "baselines must be one of"),
    ],
)
def test_settings_that_cannot_be_meant(settings, error, message):
    with pytest.raises(error, match=message):
        PruneConfig(**settings)


def test_one_shot_keeps_the_layers_and_drops_what_is_of_factors():
    given = {"pattern": "1:4", "propagate": "dense", "ignore": ("o_proj",), "head": True}
    ours = PruneConfig(**given, sweeps=3, block=8, tail=0, core_dtype="int8", wrapper_dtype="int8")
    assert ours.in_one_shot("wanda") == PruneConfig(method="wanda", **given, baselines=())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1.0),
        ({"shrinkage": 0.0}, 0.0),
        ({"shrinkage": 2.0}, 2.0),
        ({"objective": "diagonal"}, 0.0),
        ({"objective": "nowag"}, 0.0),
    ],
)
def test_the_weight_of_the_diagonal(settings, expected):
    assert PruneConfig(**settings).diagonal_weight == expected


@pytest.mark.parametrize("name", armorfact_hf.__all__)
def test_everything_that_is_exported_exists(name):
    assert getattr(armorfact_hf, name).__module__.startswith("armorfact_hf.")


def test_type_checkers_are_told_of_the_same_homes():
    tree = ast.parse(Path(armorfact_hf.__file__).read_text(encoding="utf-8"))
    [block] = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {name.asname: (found.module, name.name) for found in block.body for name in found.names}
    homes = {name: (f"armorfact_hf.{home}", name) for name, home in armorfact_hf._HOMES.items()}
    assert told == homes and sorted(homes) == armorfact_hf.__all__


def test_what_is_not_exported_is_told():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = armorfact_hf.nothing
