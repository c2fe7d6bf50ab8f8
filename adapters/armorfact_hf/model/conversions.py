"""Tensors that transformers makes of others: while it loads a model, and back again while it saves one.

Checkpoints hold the experts of most mixtures one by one; in the model they are one stack. transformers' own operations
are applied here to a few tensors at a time, where transformers applies them to a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from armorfact_hf.model.causal_lm import CausalLM

Read = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of a model that are made of stored ones.

    Args:
        model: whose they are. converter: transformers' operations.
        target: the name in the model of the first one.
        parts: the names of the stored ones, each with the pattern of the converter that it matches, in order.
    """

    model: CausalLM
    converter: WeightConverter
    target: str
    parts: tuple[tuple[str, str], ...]

    def made(self, read: Read) -> dict[str, Tensor]:
        """They, by their names in the model; ``read`` gives a stored one by its name."""
        converter = deepcopy(self.converter)
        for name, pattern in self.parts:
            # A function, called once its turn comes; the annotation has the futures of a model in memory only.
            converter.add_tensor(self.target, name, pattern, cast(Any, partial(read, name)))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def loading_conversions(model: CausalLM, names: Iterable[str]) -> list[Conversion]:
    """What transformers does, beyond renaming, with stored tensors of these names."""
    mapping, wanted = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(names, key=dot_natural_key) if converters else ():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if pattern is not None and target in wanted:
            parts.setdefault(target, []).append((name, pattern))
    return [Conversion(model, by_pattern[found[0][1]], target, tuple(found)) for target, found in parts.items()]


def conversions_without(model: CausalLM, names: Sequence[str]) -> list[WeightTransform] | None:
    """What transformers is to do when it saves a model, so that tensors of these names in it keep them.

    Returns:
        None for all that it would do anyway: then it changes none of them.
    """
    own = _own_conversions(model)
    kept = [conversion for conversion in own if not _renames(model, conversion, names)]
    return None if len(kept) == len(own) else kept


def conversions_of_dense(model: CausalLM) -> list[WeightTransform]:
    """What transformers is to do when it saves a model, so that tensors get the names that dense checkpoints have.

    Parts of names that not all checkpoints have are put back where the model's own files had them.
    """
    used = [(x.source_patterns, x.target_patterns) for x in getattr(model, "_weight_conversions", None) or ()]
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [x for x in mapping if not _is_optional(x) or (x.source_patterns, x.target_patterns) in used]


def _own_conversions(model: CausalLM) -> list[WeightTransform]:
    """What transformers does with a model's tensors when it saves them, as `revert_weight_conversion` finds it."""
    own = getattr(model, "_weight_conversions", None)
    if own is not None:
        return list(own)
    return [x for x in get_model_conversion_mapping(model, add_legacy=False) if not _is_optional(x)]


def _is_optional(conversion: WeightTransform) -> bool:
    return type(conversion).__name__ == "PrefixChange"  # which transformers 5.0 does not have


def _renames(model: CausalLM, conversion: WeightTransform, names: Iterable[str]) -> bool:
    held = {name: torch.empty(0, device="meta") for name in names}
    alone = SimpleNamespace(_weight_conversions=[conversion], config=model.config)
    return set(revert_weight_conversion(cast(Any, alone), dict(held))) != set(held)


@dataclass(frozen=True)
class Saved:
    """A tensor as transformers saves it.

    Args:
        like: of its dtype and shape.
        sources: the names in the model of what it is made of. whole: whether it is the only one of those, unchanged.
    """

    like: Tensor
    sources: tuple[str, ...]
    whole: bool


def saved_tensors(model: CausalLM, held: Mapping[str, Tensor]) -> dict[str, Saved]:
    """What transformers makes of tensors of a model, by the names that it saves them under.

    Args:
        held: by name; they may be on the meta device.
    """
    names = {id(tensor): name for name, tensor in held.items()}
    reverted = revert_weight_conversion(model, dict(held))
    whole = {name: names[id(tensor)] for name, tensor in reverted.items() if id(tensor) in names}
    taken = set(whole.values())
    sources: dict[str, list[str]] = {name: [source] for name, source in whole.items()}
    for source, tensor in held.items():
        if source not in taken:  # alone, it still tells the names that it goes into
            for name in revert_weight_conversion(model, {source: tensor}):
                sources.setdefault(name, []).append(source)
    return {name: Saved(like, tuple(sources[name]), name in whole) for name, like in reverted.items()}


def saved_as(model: CausalLM, held: Mapping[str, Tensor], saved: Mapping[str, Saved]) -> Iterator[tuple[str, Tensor]]:
    """Those of the `saved_tensors` that are made of exactly these tensors, with their values.

    Args:
        held: by their names in the model.
    """
    for name, tensor in revert_weight_conversion(model, dict(held)).items():
        if set(saved[name].sources) == set(held):
            yield name, tensor
