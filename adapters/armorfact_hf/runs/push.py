"""A pruned folder, published on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from armorfact_hf.checkpoint.verify import verify_folder
from armorfact_hf.data.origin import CARD
from armorfact_hf.files import DRAFT
from armorfact_hf.observer import Log
from armorfact_hf.report.card import write_card

# The base of all errors of the HTTP library, whichever this huggingface_hub is built on.
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])


def push_to_hub(
    folder: Path | str,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a model pruned by armorfact",
    log: Log = print,
) -> str:
    """Verify a pruned folder, then upload all its files to a repository of models on the hub, made if it is not there.

    A folder without a model card gets one first. Everything in the folder is sent, `report.json` among it, which
    names the dense model's folder by its whole path, and calibration texts without their folders.

    Args:
        folder: what `prune_to_folder` or `save_pruned` wrote.
        repo: "owner/name".
        private: whether a repository that is made here is private; one that is there keeps what it is.
        token: of the hub, with leave to write; by default the one that `hf auth login` or HF_TOKEN left.
        message: of the commit. log: called with a sentence for each slow step.

    Returns:
        The address of the repository.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: a tensor that is damaged or missing, a name that the hub does not take, no token; nothing was sent.
        OSError: the hub refuses, or cannot be reached.
    """
    folder = Path(folder)
    _check_name(repo)
    if (token or get_token()) is None:
        raise ValueError(
            "pushing needs a token of the hub that may write: run `hf auth login`, set HF_TOKEN, or give token="
        )
    log(f"Verifying {folder}.")
    verify_folder(folder)
    if not (folder / CARD).exists():
        write_card(folder)
    api = HfApi(token=token)
    with _unreachable_told(api.endpoint):
        place = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        log(f"Sending {folder} to {place}.")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[f".*{DRAFT}*"])
    return str(place)


@contextmanager
def _unreachable_told(endpoint: str) -> Iterator[None]:
    """Errors of the HTTP library, which are of no kind that Python knows, become one; the hub's own are let through."""
    try:
        yield
    except HTTP_ERROR as error:
        if isinstance(error, HfHubHTTPError):
            raise
        raise OSError(f"cannot reach {endpoint} ({error}): try again, what arrived is not sent twice") from error


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ValueError(f"expected a name on the hub like 'owner/name', got {repo!r} ({error})") from error
