"""What the hub calls a dense model, and under which licence it is: what a model card says of its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from armorfact_hf.data.demo_models import DEMO_MODELS

DEMO = "demo:"
CARD = "README.md"


@dataclass(frozen=True)
class Origin:
    """A model's name on the hub and its licence as the hub writes it ("apache-2.0"); None where it is not known."""

    hub_name: str | None = None
    licence: str | None = None


def origin_of(name: str) -> Origin:
    """The origin of a model that `load_model` loads by that name.

    The licence is the one in the model's own card: the file README.md of its folder, or of its repository on the hub,
    which is fetched.
    """
    if name.startswith(DEMO):
        demo = DEMO_MODELS[name.removeprefix(DEMO)]
        return Origin(demo.hub_name, demo.hub_licence)
    folder = Path(name)
    if folder.is_dir():
        return Origin(None, _licence(folder / CARD) if (folder / CARD).is_file() else None)
    return Origin(name, _licence(name))


def _licence(card: str | Path) -> str | None:
    """What the metadata of a card, a file or that of a repository, says; a card that cannot be read says nothing."""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None
