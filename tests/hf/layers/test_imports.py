"""The rooms of layers and files import where POSIX is not, and without circles."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import armorfact_hf

ROOT = Path(armorfact_hf.__file__).parent
ROOMS = ("layers", "checkpoint", "bench")
ELSEWHERE = ("bench.models",)  # imports the runs, whose own room answers for them
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if path.stem not in ("__init__", "triton_kernels")
)

AS_ON_WINDOWS = """
import os, sys
import torch, transformers, huggingface_hub, safetensors, numba, multiprocessing  # mind their own imports
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("register_at_fork", "fork", "sched_getaffinity", "getuid", "mkfifo"):
    vars(os).pop(name, None)
torch.set_default_device("meta")  # a user's own, on which none of what they make for themselves is to be
import importlib
for name in {names!r}:
    importlib.import_module("armorfact_hf." + name)
print("ok")
"""


def says_ok(script: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT.parent, ROOT.parents[1])))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["ok"]), done.stderr


def test_they_import_without_what_only_posix_has_and_on_any_default_device():
    says_ok(AS_ON_WINDOWS.format(names=[name for name in MODULES if name not in ELSEWHERE]))


def imported(name: str) -> set[str]:
    """The modules of these rooms that a module imports when it is imported."""
    tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("armorfact_hf."):
            home = node.module.removeprefix("armorfact_hf.")
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_no_two_of_them_need_each_other():
    graph = {name: imported(name) for name in MODULES}
    assert "layers.operators" in graph["layers.linear"] and "layers.strategies.packed" in graph["layers.execution"]
    TopologicalSorter(graph).prepare()  # raises CycleError
