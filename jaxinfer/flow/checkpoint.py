"""Folders of a trained flow: `flow.json` says what it is, `flow.safetensors` holds the arrays of flow and autoencoder.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoint.safetensors_io import open_weights, read_json
from jaxinfer.checkpoint.safetensors_save import Entry, write_file, write_json
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.flow.model import FlowModel
from jaxinfer.flow.network import Network
from jaxinfer.models import autoencoder as vae
from jaxinfer.models.autoencoder import AutoencoderConfig
from jaxinfer.models.dit import DitConfig

DESCRIPTION, ARRAYS = "flow.json", "flow.safetensors"


def save(directory: str | os.PathLike[str], model: FlowModel) -> None:
    """Write a model; the arrays first, so that a folder with a description is whole."""
    directory = Path(directory)
    arrays = {name: np.asarray(leaf) for name, leaf in _flat(_trees(model.params, model.autoencoder_params)).items()}
    entries = [Entry(n, a.shape, a.dtype, functools.partial(lambda x: x, a)) for n, a in arrays.items()]
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{ARRAYS}.{os.getpid()}.tmp"
    try:
        write_file(temporary, entries, metadata={"format": "jaxinfer-flow"})
        os.replace(temporary, directory / ARRAYS)
    finally:
        temporary.unlink(missing_ok=True)
    autoencoder = None if model.autoencoder is None else dataclasses.asdict(model.autoencoder)
    record = {
        "network": dataclasses.asdict(model.network.config),
        "autoencoder": autoencoder,
        "classes": list(model.classes),
        "condition": model.condition,
        "drop_rate": model.drop_rate,
        "velocity": model.velocity,
    }
    write_json(directory / DESCRIPTION, record)


def load(directory: str | os.PathLike[str]) -> FlowModel:
    """The model of a folder. `CheckpointError` names the file, and the tensor that is missing, of another shape, or
    not finite."""
    directory = Path(directory)
    file = directory / DESCRIPTION
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: no {DESCRIPTION}: not the folder of a flow (`jaxinfer train flow` makes one)"
        )
    record = read_json(file)
    try:
        network = Network(DitConfig(**record["network"]))
        config = None if record["autoencoder"] is None else AutoencoderConfig(**record["autoencoder"])
        about = {
            "classes": tuple(map(str, record["classes"])),
            "condition": record["condition"],
            "drop_rate": float(record["drop_rate"]),
            "velocity": record["velocity"],
        }
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file}: not the description of a flow: {type(error).__name__} {error}") from None
    key = jax.random.key(0)
    abstract = _trees(
        jax.eval_shape(network.init, key),
        None if config is None else jax.eval_shape(functools.partial(vae.init, config), key),
    )
    trees = _read(directory / ARRAYS, abstract)
    return FlowModel(network, trees["flow"], config, trees.get("autoencoder"), **about)


def _trees(params: Any, autoencoder_params: Any) -> dict[str, Any]:
    return {"flow": params, **({} if autoencoder_params is None else {"autoencoder": autoencoder_params})}


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _read(file: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    weights, wanted = open_weights(file), {name: tuple(leaf.shape) for name, leaf in _flat(abstract).items()}
    found = {name: tuple(info.shape) for name, info in weights.tensors.items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{file}: {name}: got shape {found.get(name)}, the description needs {wanted.get(name)}"
            )

    def read(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = weights.read(name)
        if not np.isfinite(value.astype(np.float32)).all():
            raise CheckpointError(f"{file}: {name} has values that are not finite; the training that wrote it diverged")
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(read, abstract)
