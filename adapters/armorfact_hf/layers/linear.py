"""`FactorizedLinear`: a linear layer whose weight is stored, and applied, as A C B."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from armorfact import BlockDiagonal, Core, Pattern
from armorfact_hf.layers import operators as operators  # registers what `forward` calls
from armorfact_hf.layers.execution import STRATEGIES, Execution
from armorfact_hf.layers.format import INTEGER_DTYPES, LayerFormat
from armorfact_hf.layers.parts import (
    PARTS,
    StoredParts,
    in_forward_mode,
    is_cast,
    name_of,
    put_empty_,
    scales_of,
    wrapper,
)
from armorfact_hf.layers.strategies import plain
from armorfact_hf.layers.strategies.strategy import Kind, Operands

OPERANDS = ("values", "positions", "left", "right", "merged", "compressed", "left_scales", "right_scales")


class FactorizedLinear(StoredParts):
    """y = x (A C B)' + bias, applied as A (C (B x)); how C is multiplied with is chosen by the number of tokens.

    Every tensor is named as it is saved: ``values`` and ``positions`` hold the core C (`armorfact.Core`), ``left`` and
    ``right`` the blocks of A and B; a layer pruned in one shot has neither of those two. Gradients pass through to x,
    and to those of the floating tensors that ask for them.

    Args:
        d_out, d_in: shape of the weight that this layer stands for.
        pattern: the N:M pattern of C.
        block: sizes (block_out, block_in) of the blocks of A and B, or None for C alone.
        bias: whether there is one.
        dtype, device: of the floating tensors.
        core_dtype: of the kept values: None is ``dtype``; with torch.int8 they are integers, whose scales the wrappers
            hold (`armorfact.quantize_core`), and no parameters: they cannot be trained.
        wrapper_dtype: of the blocks of A and B, the same: with torch.int8 around such a core they have scales, in
            ``left_scales`` and ``right_scales`` (`armorfact.quantize_wrappers`).

    Raises:
        ValueError: int8 without wrappers, or wrappers in int8 around another core; sizes that the pattern or the blocks
            do not divide; see `LayerFormat`.

    Example:
        >>> import torch
        >>> from armorfact import factorize
        >>> from armorfact_hf import FactorizedLinear
        >>> weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        >>> found = factorize(weight, None, block=16)
        >>> layer = FactorizedLinear.of(found.core, found.left, found.right)
        >>> layer
        FactorizedLinear(in_features=128, out_features=64, bias=False, pattern=2:4, block=(16, 16))
        >>> x = torch.ones(3, 128)
        >>> torch.allclose(layer(x), x @ layer.weight.T, atol=1e-4)
        True
        >>> layer.nbytes, weight.nbytes  # blocks of 128 and more weigh less, beside the usual sizes
        (29696, 32768)
    """

    values: Tensor
    positions: Tensor
    left: Tensor | None
    right: Tensor | None
    left_scales: Tensor | None
    right_scales: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        d_out: int,
        d_in: int,
        pattern: str | Pattern = "2:4",
        block: tuple[int, int] | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
        core_dtype: torch.dtype | None = None,
        wrapper_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = d_out, d_in
        self.pattern = Pattern.parse(pattern)
        self.block = None if block is None else (index(block[0]), index(block[1]))
        floating = dtype or torch.get_default_dtype()
        whole = name_of(core_dtype, floating), name_of(wrapper_dtype, floating)
        layout = LayerFormat("FactorizedLinear", (d_out, d_in), self.pattern, self.block, None, *whole)
        held = layout.tensors | ({"bias": layout.bias} if bias else {})
        for part in PARTS:
            put_empty_(self, part, held.get(part), layout.integers.get(part), dtype, device)
        self.execution: Execution | None = None
        self.choice = ""  # the text of that, as the operators take it
        self.register_buffer("merged", None, persistent=False)
        self.register_buffer("compressed", None, persistent=False)

    @classmethod
    def empty(
        cls, layout: LayerFormat, bias: bool, dtype: torch.dtype | None = None, device: Any = None
    ) -> FactorizedLinear:
        """A layer of these sizes that holds zeros."""
        whole = [INTEGER_DTYPES.get(each or "") for each in (layout.core_dtype, layout.wrapper_dtype)]
        return cls(*layout.shape, layout.pattern, layout.block, bias, dtype, device, *whole)

    @classmethod
    def of(
        cls,
        core: Core,
        left: BlockDiagonal | None = None,
        right: BlockDiagonal | None = None,
        bias: Tensor | None = None,
    ) -> FactorizedLinear:
        """The layer that holds these factors; they are copied.

        Args:
            core: C. left, right: A and B, both or neither; both where C is int8. bias: (d_out,) or None.

        Raises:
            ValueError: A or B alone, sizes that do not fit each other, A or B in int8 and the other not, or scales of
                blocks that are floating.
        """
        if (left is None) != (right is None):
            raise ValueError("expected both wrappers or neither, got one of them: the other may be blocks of ones")
        given = {"values": core.values, "positions": core.packed, "bias": bias}
        block, floating, whole = None, core.values.dtype, None
        if left is not None and right is not None:
            if left.blocks.dtype != right.blocks.dtype:
                raise ValueError(f"expected A and B in one dtype, got {left.blocks.dtype} and {right.blocks.dtype}")
            block, floating, whole = (left.blocks.shape[-1], right.blocks.shape[-1]), left.dtype, left.blocks.dtype
            given |= {"left": left.blocks, "left_scales": scales_of(left)}
            given |= {"right": right.blocks, "right_scales": scales_of(right)}
        dtype = floating if floating.is_floating_point else None
        layer = cls(
            *core.shape, core.pattern, block, bias is not None, dtype, core.values.device, core.values.dtype, whole
        )
        with torch.no_grad():
            for name, tensor in given.items():
                if tensor is not None:
                    place = getattr(layer, name)
                    if place.shape != tensor.shape:
                        raise ValueError(
                            f"{name} has shape {tuple(tensor.shape)}, a core of {core.shape} needs {tuple(place.shape)}"
                        )
                    place.copy_(tensor)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating tensors, and so of the inputs."""
        wrapper = self.left if self.left_scales is None else self.left_scales
        return (self.values if wrapper is None else wrapper).dtype

    @property
    def layout(self) -> LayerFormat:
        """How it is stored."""
        dtype, shape = self.dtype, (self.out_features, self.in_features)
        whole = [name_of(None if held is None else held.dtype, dtype) for held in (self.values, self.left)]
        return LayerFormat("FactorizedLinear", shape, self.pattern, self.block, None, *whole)

    @property
    def core(self) -> Core:
        """C as it is stored."""
        return Core(self.values.detach(), self.positions, self.pattern, self.in_features)

    @property
    def wrappers(self) -> tuple[BlockDiagonal, BlockDiagonal] | None:
        """A and B as they are stored, or None."""
        if self.left is None or self.right is None:
            return None
        return wrapper(self.left, self.left_scales), wrapper(self.right, self.right_scales)

    @property
    def weight(self) -> Tensor:
        """A C B, (d_out, d_in); formed at every call."""
        with torch.no_grad():
            return self._operands().dense()

    @property
    def kind(self) -> Kind:
        """What decides which strategies can run this layer."""
        held = self.values
        return Kind((self.out_features, self.in_features), self.pattern, self.dtype, held.device, held.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are saved."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def use_(self, execution: Execution | None) -> FactorizedLinear:
        """Choose how this layer runs, in place; None goes by `default_execution`.

        "dense" and "semi_structured" keep a second form of the weight in memory, until the layer is moved, cast, or
        loaded anew, and that of "semi_structured" until it is copied or pickled, which ends the choice (after a cast
        through `.data`, of which a module is not told, the default runs). It is made of the factors as they are now:
        train them or write into them with None, and choose again. Where it does not fit in memory, the choice is None.

        Raises:
            ValueError: a strategy that cannot run the layer where it is; the message says why.
        """
        chosen = [] if execution is None else [STRATEGIES[name] for name in sorted(execution.strategies)]
        for strategy in chosen:
            if (reason := strategy.refusal(self.kind)) is not None:
                raise ValueError(reason)
        self.merged = self.compressed = self.execution = None
        self.choice = ""
        with torch.no_grad():
            prepared = [strategy.prepare(self._operands()) for strategy in chosen]
        for name, kept in (item for each in prepared for item in each.items()):
            setattr(self, name, kept)
        self.execution = execution
        self.choice = "" if execution is None else execution.text
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y (..., d_out) for x (..., d_in), in the dtype of x.

        Raises:
            ValueError: the last size of x is not d_in, or x is on another device than the layer, or, outside of
                autocast, of another dtype.
        """
        dtype = self.dtype
        x = self.accepted(x, dtype)
        y = self._product(x.reshape(-1, self.in_features), dtype)
        if (bias := self.bias) is not None:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def accepted(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as it is multiplied with: in autocast's dtype inside of it. ``dtype`` is the layer's own.

        Raises:
            ValueError: as `forward` does.
        """
        if is_cast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != dtype:
            raise ValueError(f"expected an input of {dtype}, as the layer's own, got {x.dtype}")
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input (..., {self.in_features}), got {tuple(x.shape)}")
        if x.device != self.values.device:
            raise ValueError(f"expected an input on {self.values.device}, as the layer is, got {x.device}")
        return x

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """No branch here goes by the number of tokens: the operator decides by it, in a traced graph too."""
        if x.dtype != dtype or self.passes_gradients(x):
            return plain.product(x, self._operands())
        return torch.ops.armorfact.factorized_linear(
            x,
            self.values,
            self.positions,
            self.left,
            self.right,
            self.merged,
            self.compressed,
            self.pattern.keep,
            self.pattern.group,
            self.choice,
            self.left_scales,
            self.right_scales,
        )

    def _operands(self) -> Operands:
        factors, scales = (self.values, self.positions, self.left, self.right), (self.left_scales, self.right_scales)
        return Operands(*factors, self.pattern, self.in_features, None, None, *scales)

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those of `Operands`, in its order, as the operators take them."""
        held = {**self._parameters, **self._buffers}  # looking each up as an attribute takes ten times as long
        return [held.get(name) for name in OPERANDS]

    def passes_gradients(self, x: Tensor) -> bool:
        """Whether autograd may ask for any, of x or of a factor."""
        if in_forward_mode():
            return True
        if not torch.is_grad_enabled():
            return False
        held = (x, self.values, self.left, self.right, self.left_scales, self.right_scales)
        return any(tensor is not None and tensor.requires_grad for tensor in held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorizedLinear:
        before = self.values.device, self.dtype
        super()._apply(fn, recurse)
        if before != (self.values.device, self.dtype):
            self.use_(None)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.compressed is not None:  # in a form that belongs to one kind of GPU, and this may be another machine
            self.use_(None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.use_(None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, block={self.block}"
            + ("" if self.layout.core_dtype is None else f", core={self.layout.core_dtype}")
            + ("" if self.layout.wrapper_dtype is None else f", wrappers={self.layout.wrapper_dtype}")
        )
