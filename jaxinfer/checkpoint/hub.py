"""Names to directories: a path, a packaged model, or a repository in the local Hugging Face cache.

Nothing touches the network unless the caller passes `download=True`.

Stability: experimental.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from jaxinfer.errors import CheckpointError, InputError

PACKAGED = ("tinycode", "tinycode-draft")
# Draft heads of tinycode; a release ships those of them that pay.
PACKAGED_HEADS = ("tinycode-medusa", "tinycode-eagle", "tinycode-chimera", "tinycode-ppd")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Weights other than safetensors are never read, so they are not fetched either.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def resolve(name: str | os.PathLike[str], *, revision: str | None = None, download: bool = False) -> Path:
    """The local directory of a checkpoint named by `name`.

    In this order: "tinycode" and "tinycode-draft" are the packaged models (write ./tinycode for a folder of that name),
    "tinycode-medusa" and its like packaged heads, where they are installed; a directory is itself; "owner/name" is
    looked up in the local Hub cache (HF_HOME and HF_HUB_CACHE are honoured by huggingface_hub). With `download=True`
    what is missing is fetched. Raises CheckpointError that says what to do.
    """
    text = os.fspath(name)
    if not text or "\0" in text:
        raise InputError(f"{text!r} is no model; give a directory, owner/name or one of {', '.join(PACKAGED)}")
    if text in PACKAGED:
        return _packaged(text)
    if (head := packaged_head(text)) is not None:
        return head
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{text}: a file; give the directory with config.json and the weights: {path.parent}")
    if isinstance(name, str) and _REPOSITORY.fullmatch(text):
        return _from_hub(text, revision, download)
    raise CheckpointError(_no_such_path(text, path))


def packaged_head(name: str) -> Path | None:
    """The directory of a packaged draft head; None where there is none of that name in this installation."""
    directory = importlib.resources.files("jaxinfer") / "assets" / name
    found = name in PACKAGED_HEADS and isinstance(directory, Path) and (directory / "heads.json").is_file()
    return Path(str(directory)) if found else None


def _packaged(name: str) -> Path:
    directory = importlib.resources.files("jaxinfer") / "assets" / name
    if not isinstance(directory, Path) or not (directory / "config.json").is_file():
        raise CheckpointError(f"the packaged model {name!r} is not in this installation of jaxinfer ({directory})")
    return directory


def _no_such_path(text: str, path: Path) -> str:
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    beside = sorted(p.name for p in parent.iterdir() if p.is_dir())[:6] if parent.is_dir() else []
    held = f"; {parent.resolve()} exists and holds {', '.join(beside)}" if beside else f"; {parent.resolve()} exists"
    return (
        f"{text}: no such directory{held}. A model is a directory with config.json, a Hub name as owner/name, or one "
        f"of {', '.join(PACKAGED)}"
    )


def _from_hub(repository: str, revision: str | None, download: bool) -> Path:
    pinned = f" --revision {revision}" if revision else ""
    fetch = f"hf download {repository}{pinned}"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repository}: no such directory, and huggingface_hub is not installed, so the Hub cache cannot be read. "
            f"Run: pip install huggingface_hub && {fetch}"
        ) from None
    try:
        found = snapshot_download(
            repository, revision=revision, local_files_only=not download, allow_patterns=list(_WANTED)
        )
    except errors.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached" if download else "neither a directory here nor in the local Hub cache"
        hint = "Check the network or" if download else "Pass download=True or"
        raise CheckpointError(f"{repository}: {reason}. {hint} run: {fetch}") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as e:
        line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{repository}: the Hub says: {line}. A gated model needs: hf auth login") from None
    directory = Path(found)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{repository}: {directory} holds no config.json. To fetch what is missing run: {fetch}")
    return directory
