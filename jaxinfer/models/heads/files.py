"""Folders of a draft head: `heads.json` says what it is and whose, `heads.safetensors` holds its arrays.

`heads.json`: `kind`, `settings`, and `target` with its hidden size, vocabulary and a digest of 64 rows of its embedding
(rounded to bfloat16, so that the digest does not depend on the dtype that a model was loaded in). A head belongs to the
target that it was trained on: another of the same shape would accept few drafts, so it is refused. The embedding of a
target whose embedding is quantized cannot be compared; shapes are checked all the same.

A new head joins with a row in `base.HEADS`; nothing here changes.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoint.safetensors_io import open_weights, read_json
from jaxinfer.checkpoint.safetensors_save import Entry, write_file, write_json
from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.heads.base import Head, TargetShape, head_class

DESCRIPTION, ARRAYS = "heads.json", "heads.safetensors"
ROWS = 64


@dataclasses.dataclass(frozen=True)
class LoadedHead:
    """A head with its params, the digest of its target's embedding, and where it was found."""

    head: Head
    params: Any
    digest: str
    directory: Path | None = None

    def check(self, config: ModelConfig, params: Any = None) -> None:
        """ConfigError unless it is a head of this target (`params` None: shapes alone are compared)."""
        where = "this head" if self.directory is None else f"the head in {self.directory}"
        wanted, found = self.head.target, TargetShape.of(config)
        for name in ("vocab_size", "hidden_size"):
            if getattr(wanted, name) != getattr(found, name):
                raise ConfigError(
                    f"{where} is for a target with {name} {getattr(wanted, name)}, this one has {getattr(found, name)}"
                )
        if any(not -config.num_layers <= tap < config.num_layers for tap in self.head.taps):
            raise ConfigError(f"{where} reads layers {list(self.head.taps)}, the target has {config.num_layers}")
        digest = None if params is None else embedding_digest(params)
        if digest is not None and digest != self.digest:
            raise ConfigError(
                f"{where} was trained on another target (its embedding differs); train one for this model"
            )


def holds_head(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder is a head's."""
    return (Path(directory) / DESCRIPTION).is_file()


def save_head(
    directory: str | os.PathLike[str], head: Head, params: Any, target_params: Any, *, dtype: str = "bfloat16"
) -> None:
    """Write a head trained on the model of `target_params`, whose embedding must be a plain array."""
    directory = Path(directory)
    digest = embedding_digest(target_params)
    if digest is None:
        raise InputError("save_head: the target's embedding is quantized; give the params as they were loaded")
    _check_params(head, params)
    arrays = {path: np.asarray(jnp.asarray(leaf, dtype)) for path, leaf in _flat(params).items()}
    entries = [Entry(n, a.shape, a.dtype, functools.partial(lambda x: x, a)) for n, a in arrays.items()]
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{ARRAYS}.{os.getpid()}.tmp"
    try:
        write_file(temporary, entries, metadata={"format": "jaxinfer-head"})
        os.replace(temporary, directory / ARRAYS)
    finally:
        temporary.unlink(missing_ok=True)
    target = {**dataclasses.asdict(head.target), "embedding": digest}
    write_json(directory / DESCRIPTION, {"kind": head.kind, "settings": head.settings(), "target": target})


def describe(directory: str | os.PathLike[str]) -> tuple[Head, str]:
    """The head of a folder and the digest of its target's embedding; no array is read."""
    file = Path(directory) / DESCRIPTION
    record = read_json(file)
    try:
        kind, target = record["kind"], dict(record["target"])
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in record["settings"].items()}
        digest = str(target.pop("embedding"))
        shape = TargetShape(**target)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{file}: not the description of a head: {type(e).__name__} {e}") from None
    try:
        return head_class(kind)(shape, **settings), digest
    except TypeError as e:
        raise CheckpointError(f"{file}: settings do not fit kind {kind!r}: {e}") from None


def load_head(directory: str | os.PathLike[str], *, dtype: str = "float32") -> LoadedHead:
    """The head of a folder with its arrays in `dtype`; CheckpointError names the file and what is wrong with it."""
    directory = Path(directory)
    head, digest = describe(directory)
    weights, abstract = open_weights(directory / ARRAYS), _flat(head.abstract())
    found = {name: tuple(info.shape) for name, info in weights.tensors.items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{directory / ARRAYS}: {name}: got shape {found.get(name)}, the description needs {wanted.get(name)}"
            )
    params: dict[str, Any] = {}
    for name in wanted:
        *above, last = name.split("/")
        at = params
        for part in above:
            at = at.setdefault(part, {})
        at[last] = jnp.asarray(weights.read(name), dtype)
    return LoadedHead(head, params, digest, directory)


def embedding_digest(params: Any) -> str | None:
    """A short hash of evenly spaced rows of a target's embedding; None where it is no plain array."""
    embedding = params["embedding"]
    if not isinstance(embedding, jax.Array | np.ndarray):
        return None
    rows = np.linspace(0, embedding.shape[0] - 1, min(ROWS, embedding.shape[0])).astype(np.int32)
    shown = np.asarray(jnp.asarray(embedding[rows]).astype(jnp.bfloat16)).view(np.uint16)
    return hashlib.sha256(shown.tobytes()).hexdigest()[:16]


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_params(head: Head, params: Any) -> None:
    wanted = {name: tuple(leaf.shape) for name, leaf in _flat(head.abstract()).items()}
    found = {name: tuple(leaf.shape) for name, leaf in _flat(params).items()}
    if wanted != found:
        bad = next(name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name))
        raise InputError(f"params/{bad}: got shape {found.get(bad)}, a {head.kind} head needs {wanted.get(bad)}")
