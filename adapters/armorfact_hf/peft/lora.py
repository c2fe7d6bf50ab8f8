"""LoRA on a pruned layer: y = A C B x + s·V U x, the factors frozen, U and V trained.

PEFT's own layer for linear ones does the rest. What would write into the weight A C B is refused: there is no such
weight to write into, it is formed anew from the factors whenever it is asked for.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft.tuners.lora import Linear, LoraConfig  # not from peft itself, which is being imported at this moment
from peft.tuners.tuners_utils import check_adapters_to_merge

from armorfact_hf.layers.linear import FactorizedLinear

STARTS = (True, False, "gaussian", "orthogonal")  # those that leave the base weight as it is


class FactorizedLora(Linear):
    """A `FactorizedLinear` with LoRA adapters, in PEFT's sense."""

    def _get_in_out_features(self, module: FactorizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Of PEFT's variants the plain one and DoRA."""
        known = super().lora_variants
        return {names: known[names] for names in ((), ("use_dora",))}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **more: Any) -> None:
        """Add an adapter to the layer.

        Raises:
            ValueError: settings that would change the weight, or a variant of LoRA that is not tested on pruned layers.
        """
        self.fan_in_fan_out = False  # whatever was pruned, also GPT-2's `Conv1D`, is (d_out, d_in) now
        _check(config, more.get("target_name") or "a pruned layer")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **more)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: the sum of A C B and an adapter is no 2:4 core between wrappers.

        Raises:
            ValueError: there is an adapter to merge; says what to do in its place.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if names:
            base = self.get_base_layer()
            raise ValueError(
                f"cannot merge the adapter {', '.join(names)} into a pruned layer ({base.out_features}x"
                f"{base.in_features}, {base.pattern}): the sum is neither sparse nor factorized. Keep the adapter "
                "beside the model with save_pretrained, or merge it into the dense weights of `armorfact export` and "
                "prune those again"
            )


def _check(config: LoraConfig, layer: str) -> None:
    start = config.init_lora_weights
    if start not in STARTS:
        raise ValueError(
            f"{layer} is pruned: init_lora_weights={start!r} may change the weight that the adapter is added to, and "
            f"factors have none; expected one of {', '.join(map(repr, STARTS))}"
        )
    asked = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    if unknown := [name for name in asked if getattr(config, name) and name != "use_dora"]:
        raise ValueError(f"{layer} is pruned: {unknown[0]} is not supported there, plain LoRA and use_dora are")
