"""Triton kernels compiled for a GPU where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")


class Compiled:
    """Stands for a kernel: what it is launched with is compiled for a GPU, without one."""

    def __init__(self, kernel):
        self.kernel, self.shared = kernel, 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, num_stages=3, **constants):
        kinds = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
        kinds |= {torch.int32: "*i32", torch.int8: "*i8"}
        names = self.kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | constants
        signature = dict.fromkeys(names, "constexpr")
        for name, argument in arguments.items():
            if isinstance(argument, Tensor):
                signature[name] = kinds[argument.dtype]
            elif name not in constants and argument not in (None, 1):
                signature[name] = "i32"
        fixed = {(names.index(n),): arguments[n] for n in names if signature[n] == "constexpr"}
        source = triton.compiler.ASTSource(self.kernel, signature, fixed)
        target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.shared = triton.compile(source, target=target, options=options).metadata.shared
