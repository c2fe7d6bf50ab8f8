"""The files of a model that is to be served, verified before vLLM loads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from armorfact_hf.checkpoint.contents import AGAIN
from armorfact_hf.checkpoint.folder import describe_folder, local_folder
from armorfact_hf.checkpoint.verify import check_headers, verify_folder


def stored_names(model: str, revision: str | None, whole: bool) -> frozenset[str]:
    """The names of a model's tensors, once the files are found to be as config.json says.

    vLLM does not count the tensors of a model that is stored in a way of its own. So whatever config.json has a digest
    of has to be there.

    Args:
        model: a folder or a name on the hub. revision: of that.
        whole: read every tensor, rather than the headers of the files.

    Raises:
        ValueError: a file or a tensor is missing or damaged, and named; see `verify_folder`.
    """
    folder = local_folder(model, revision)
    description = describe_folder(folder)
    names = verify_folder(folder, description).names if whole else check_headers(folder, description)
    if missing := missing_tensors(description.sha256, names):
        raise ValueError(f"{folder} lacks {', '.join(missing[:5])} ({len(missing)} in all): {AGAIN}")
    return names


def missing_tensors(sha256: Mapping[str, str], stored: Collection[str]) -> list[str]:
    """The tensors that have a digest and are not stored; a head that is tied to the embedding is stored as that.

    Where a stored tensor has no digest, transformers renamed some when it saved, and none can be said to be missing.
    """
    if not set(stored) <= set(sha256):
        return []
    held = {sha256[name] for name in stored}
    return sorted(name for name, digest in sha256.items() if name not in stored and digest not in held)
