"""What a run was measured on."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from typing import Any

import torch

OPTIONAL = ("pytest", "hypothesis", "triton", "cupy", "transformers", "numba")


def machine(device: str) -> dict[str, Any]:
    """The device, the versions of what runs on it, and which optional packages are missing."""
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if device != "cpu":
        found = torch.cuda.get_device_properties(device)
        facts = {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory GB": round(found.total_memory / 1e9, 1),
            "CUDA": torch.version.cuda or "none",
            "cuSPARSELt": torch.backends.cusparselt.version() or "none",
        }
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    return {**facts, "torch": torch.__version__, "Python": platform.python_version(), "missing": ", ".join(missing)}
