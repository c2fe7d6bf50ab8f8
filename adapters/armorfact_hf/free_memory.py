"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of this machine or the control group that the process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # asks for a module that not every system has

    free: int = psutil.virtual_memory().available
    try:
        most, used = (int((CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(free, most - used)
    except (OSError, ValueError):  # there is none, or it is not limited
        return free
