"""The examples in the docstrings of the public names say what happens."""

from __future__ import annotations

import doctest

import pytest

import armorfact


@pytest.mark.parametrize("name", ["factorize", "quantize_core", "quantize_wrappers", "Core", "Status", "auto_block"])
def test_the_example_is_true(name):
    shown = getattr(armorfact, name)
    module = __import__(shown.__module__, fromlist=["_"])
    [found] = doctest.DocTestFinder(recurse=False).find(shown, name, module=module)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
