"""What config.json says comes back as it was written, and is refused with the reason where it is malformed."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorfact import Pattern
from armorfact_hf.checkpoint.description import Description, NotPruned
from armorfact_hf.layers.format import LayerFormat
from tests.hf.checkpoint.cases import NAME, SETTINGS, config, entry, mutate_


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
    (config(version=5), "version 5 of the format, this armorfact reads versions 1, 2, 3, 4: install the version"),
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
