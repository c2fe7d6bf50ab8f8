"""How much memory there is, and how much was taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CONTROL_GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of versions 2 and 1: the limit, what is taken, and what of that is files that the system gives back when it has to.
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left: of a CPU, PyTorch says it by a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def available(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of this machine and the control groups that the process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # asks for a module that not every system has

    free: int = psutil.virtual_memory().available
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What is left below the limit of each control group that has one."""
    for version, group in _groups():
        most, taken, files = FILES[version]
        try:
            limit, used = (int((group / name).read_text()) for name in (most, taken))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield limit - used + int(stat.get(files, 0))
        except (OSError, ValueError):  # it is not limited, or not to be seen from a container
            continue


def _groups() -> Iterator[tuple[int, Path]]:
    """The version and the folder of the process's group and of all that it is in."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, CONTROL_GROUPS / "memory") if controllers else (2, CONTROL_GROUPS)
        inside = Path(path.lstrip("/"))
        yield from ((version, root / each) for each in (inside, *inside.parents))


def peak_memory(process: int | str = "self") -> int:
    """The most memory that this process has held, in bytes; or, on Linux, another one by its number."""
    status = Path(f"/proc/{process}/status")
    if status.exists():  # what getrusage says there counts what the process was forked from
        [line] = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
