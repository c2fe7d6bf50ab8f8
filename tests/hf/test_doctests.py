"""The examples in the docstrings of the public names say what happens."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch

import armorfact_hf


@pytest.mark.parametrize("name", ["prune_"])
def test_the_example_is_true(name):
    shown = getattr(armorfact_hf, name)
    [found] = doctest.DocTestFinder(recurse=False).find(shown, name, module=import_module(shown.__module__))
    assert found.examples
    torch.manual_seed(0)
    assert doctest.DocTestRunner().run(found).failed == 0
