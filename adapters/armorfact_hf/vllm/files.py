"""The files of a model that is to be served, verified before vLLM loads them."""

from __future__ import annotations

from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.folder import describe_folder, local_folder
from armorfact_hf.checkpoint.verify import check_headers, verify_folder


def stored_names(model: str, revision: str | None, whole: bool) -> frozenset[str]:
    """The names of a model's tensors, once the files are found to be as config.json says.

    Args:
        model: a folder or a name on the hub. revision: of that.
        whole: read every tensor, rather than the headers of the files.

    Raises:
        ValueError: a file or a tensor is missing or damaged, and named; see `verify_folder`. Experts are pruned.
    """
    folder = local_folder(model, revision)
    description = describe_folder(folder)
    refuse_experts(description)
    shapes = verify_folder(folder, description).shapes if whole else check_headers(folder, description)
    return frozenset(shapes)


def refuse_experts(description: Description) -> None:
    """Raise ValueError if experts are pruned, which vLLM runs by kernels of its own."""
    for name, layer in description.modules.items():
        if layer.experts is not None:
            raise ValueError(
                f"{name} holds pruned experts, and vLLM runs experts by kernels of its own, which read dense weights: "
                "leave them dense: prune the dense model again with `armorfact prune --ignore 're:.*experts'`"
            )
