"""Triton's interpreter, for the tests of its kernels."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from armorfact_hf.layers.kernels import triton_source


@cache
def interpreted_kernels():
    """A second copy of the kernels; the one that others import stays compiled."""
    path = triton_source.__file__.replace("triton_source", "triton_kernels")
    spec = spec_from_file_location("interpreted_kernels", path)
    kernels = module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return kernels


@contextmanager
def attributes_kept(*owners):
    """What is set on these modules and classes meanwhile is undone."""
    before = [(owner, dict(vars(owner))) for owner in owners]
    yield
    for owner, attributes in before:
        for name in vars(owner).keys() - attributes.keys():
            delattr(owner, name)
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@pytest.fixture
def interpreted(monkeypatch):
    """The Triton kernels run in Triton's interpreter."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton decorated its own sum when it was imported, before the variable was set.
    monkeypatch.setattr(tl, "sum", triton.jit(tl.sum.fn))
    kernels = interpreted_kernels()
    monkeypatch.setattr(triton_source, "_kernels", lambda: kernels)
    # A kernel that calls another function leaves the language patched, and nothing compiles any more.
    with attributes_kept(tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base):
        yield
