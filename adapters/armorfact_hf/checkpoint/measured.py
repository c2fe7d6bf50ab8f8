"""The choice of strategies that `armorfact bench` measured, in a file beside the checkpoint.

    {"version": 1, "devices": {"<device>": {"<dtype>": {"<shape>": [[16, "packed"], [null, "dense"]]}}}}

It only says how fast to compute, never what: a file that is damaged or of another version is not used, with a warning.
"""

from __future__ import annotations

import json
import platform
import warnings
from pathlib import Path

import torch
from torch import nn

from armorfact_hf.files import written_beside
from armorfact_hf.free_memory import ran_out
from armorfact_hf.layers.execution import Execution
from armorfact_hf.layers.format import dtype_name
from armorfact_hf.layers.linear import FactorizedLinear

FILE = "execution.json"
VERSION = 1
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RecursionError,
)  # what a file that is not as above leads to
Choices = dict[str, Execution]  # by shape, see `shape_key`


def device_name(device: torch.device) -> str:
    """The name under which the choices for a device are kept: the GPU's, or the processor's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _processor() -> str:
    """What Linux calls the processor; elsewhere what Python does."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8", errors="replace").splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def shape_key(layer: FactorizedLinear) -> str:
    """Layers with equal keys run equally fast."""
    block = "" if layer.block is None else f" in {layer.block[0]}x{layer.block[1]}"
    layout = layer.layout
    core = "" if layout.core_dtype is None else f", {layout.core_dtype}"
    wrappers = "" if layout.wrapper_dtype is None else f", {layout.wrapper_dtype} wrappers"
    return f"{layer.out_features}x{layer.in_features}{block}{core}{wrappers}"


def write_measured(folder: Path, device: torch.device, dtype: torch.dtype, choices: Choices) -> Path:
    """Keep the choices for a device and dtype beside a checkpoint, those for others as they are; the file written.

    A file that cannot be read is written anew.

    Raises:
        OSError: nothing can be written there.
    """
    path = folder / FILE
    kept = {shape: [list(pair) for pair in execution.choices] for shape, execution in choices.items()}
    try:
        devices = _read(path)
        devices.setdefault(device_name(device), {})[dtype_name(dtype)] = kept
    except DAMAGE:
        devices = {device_name(device): {dtype_name(dtype): kept}}
    with written_beside(path) as draft:
        draft.write_text(json.dumps({"version": VERSION, "devices": devices}, indent=1), encoding="utf-8")
    return path


def read_measured(folder: Path, device: torch.device, dtype: torch.dtype) -> Choices:
    """The choices for a device and dtype; empty where none were measured."""
    path = folder / FILE
    if not path.exists():
        return {}
    found = _read(path).get(device_name(device), {}).get(dtype_name(dtype), {})
    return {shape: Execution.of(choices) for shape, choices in found.items()}


def use_measured_(model: nn.Module, folder: Path) -> nn.Module:
    """Let every pruned layer run as it was measured fastest, where it was measured; in place."""
    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    places = {(layer.values.device, layer.dtype) for layer in layers}
    try:
        found = {place: read_measured(folder, *place) for place in places}
        for layer in layers:
            execution = found[layer.values.device, layer.dtype].get(shape_key(layer))
            if execution is not None:
                layer.use_(execution)
    except (*DAMAGE, RuntimeError) as error:
        if not isinstance(error, DAMAGE) and not ran_out(error):
            raise
        warnings.warn(f"{folder / FILE} is not used ({error}); `armorfact bench` writes it anew", stacklevel=2)
        for layer in layers:
            layer.use_(None)
    return model


def _read(path: Path) -> dict:
    if not path.is_file():  # a folder, or what would be waited for, as a pipe is
        raise ValueError("it is no file")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("version") != VERSION:
        raise ValueError(f"it is of version {found.get('version')}, expected {VERSION}")
    return found["devices"]
