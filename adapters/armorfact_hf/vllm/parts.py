"""One module of the checkpoint inside of one of vLLM's layers, as far as this rank computes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armorfact_hf.checkpoint.contents import check_contents
from armorfact_hf.checkpoint.damage import AGAIN
from armorfact_hf.layers.cuts import Share
from armorfact_hf.layers.format import LayerFormat, dtype_name
from armorfact_hf.layers.linear import FactorizedLinear


class Part:
    """A `FactorizedLinear`, or a dense layer beside one, that is filled tensor by tensor.

    Args:
        name: in the checkpoint. share: what this rank computes of it. dtype: of its floating tensors here.
        layer: how it is stored as a whole; None is dense.

    Raises:
        ValueError: the rank cannot hold its share; see `Share.of_format`.
    """

    def __init__(self, name: str, share: Share, dtype: torch.dtype, layer: LayerFormat | None) -> None:
        self.name, self.share, self.layer = name, share, layer
        self.module: nn.Linear | FactorizedLinear
        if layer is None:
            self.shapes: dict[str, tuple[int, ...]] = {"weight": share.whole}
            d_out, d_in = share.shape
            self.module = nn.Linear(d_in, d_out, bias=False, dtype=dtype).requires_grad_(False)
        else:
            self.shapes, held = layer.tensors, share.of_format(layer)
            self.module = FactorizedLinear.empty(held, bias=False, dtype=dtype)
        self.missing = set(self.shapes)

    def load(self, part: str, tensor: Tensor) -> None:
        """Take the rank's share of a tensor of the checkpoint.

        Args:
            part: its name under the module. tensor: as it is stored, whole.

        Raises:
            ValueError: the module has no such tensor, or one of another shape or dtype, or it is damaged.
        """
        self._check(part, tensor)
        whole, share = self.layer, self.share
        held = share.of_weight(tensor) if whole is None else share.of_factor(whole, part, tensor)
        getattr(self.module, part).copy_(held)
        self.missing.discard(part)

    def _check(self, part: str, tensor: Tensor) -> None:
        where, found = f"tensor {self.name}.{part}", tuple(tensor.shape)
        if part not in self.shapes:
            kind = "dense" if self.layer is None else "pruned"
            raise ValueError(f"{where} is unexpected: {self.name} is {kind} and has {', '.join(self.shapes)}: {AGAIN}")
        whole = None if self.layer is None else self.layer.integers.get(part)
        if found != self.shapes[part] or (not tensor.is_floating_point() if whole is None else tensor.dtype != whole):
            expected = "floating numbers" if whole is None else dtype_name(whole)
            raise ValueError(
                f"{where}: expected {expected} of shape {list(self.shapes[part])}, got {tensor.dtype} of "
                f"{list(found)}: {AGAIN}"
            )
        if self.layer is not None:
            with torch.device(tensor.device):  # vLLM sets another one to build its model on
                check_contents(where, tensor, part, self.layer)
