"""Free memory is what the machine and every control group around the process leave."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from armorfact_hf import free_memory
from armorfact_hf.free_memory import available, peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that puts a machine with 1000 bytes free and some control groups in place of this one."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(free_memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(free_memory, "MEMBERSHIP", tmp_path / "membership")

    def put(membership: str, **files: str) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return put


def test_where_nothing_is_limited_it_is_the_machines(machine):
    assert available(CPU) == 1000  # no control groups at all
    machine("0::/", memory_dot_max="max", memory_dot_current="5", memory_dot_stat="inactive_file 1")
    assert available(CPU) == 1000


def test_files_that_can_be_given_back_are_free(machine):
    machine("0::/", memory_dot_max="900", memory_dot_current="800", memory_dot_stat="anon 100\ninactive_file 300")
    assert available(CPU) == 400


def test_every_group_around_the_process_counts(machine):
    job = {"job__step__memory_dot_max": "max", "job__step__memory_dot_current": "1", "job__step__memory_dot_stat": ""}
    limited = {"job__memory_dot_max": "700", "job__memory_dot_current": "200", "job__memory_dot_stat": ""}
    machine("0::/job/step", memory_dot_max="900", memory_dot_current="100", memory_dot_stat="", **job, **limited)
    assert available(CPU) == 500


def test_the_first_version_of_control_groups(machine):
    names = ("limit_in_bytes", "usage_in_bytes", "stat")
    texts = ("600", "400", "inactive_file 1\ntotal_inactive_file 50")
    machine(
        "3:cpu:/job\n2:memory,other:/job\n0::/",
        **{f"memory__job__memory_dot_{name}": text for name, text in zip(names, texts, strict=True)},
    )
    assert available(CPU) == 250


def test_the_peak_of_memory_where_there_is_no_resource_module(monkeypatch):
    resource = pytest.importorskip("resource")
    assert peak_memory() > 1e6
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory() == 5 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory() == 5
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert peak_memory() == 123
