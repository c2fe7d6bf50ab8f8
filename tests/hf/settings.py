"""Settings made of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from armorfact_hf.pruning.config import OF_MATCHING, PruneConfig


def layers_alone(config: PruneConfig, **changes: Any) -> PruneConfig:
    """The same without matching, whose settings would be refused then."""
    untouched = {name: getattr(PruneConfig, name) for name in OF_MATCHING}
    return replace(config, refine=None, **untouched, **changes)
