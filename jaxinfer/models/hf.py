"""Hugging Face directories: load one onto devices, save any model as one that transformers loads.

Loading maps the files and places each param's shards straight from them: transposed, cut out of fused tensors, stacked
from experts, converted, a shard at a time. Saving streams tensor by tensor. `hf_names.py` has the tables.

Stability: experimental.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxinfer import ops, quant
from jaxinfer.checkpoint.safetensors_io import Source, Stacked, Weights, open_weights, place, read_json, to_host
from jaxinfer.checkpoint.safetensors_save import Entry, save, write_json
from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import config_from_hf, config_to_hf
from jaxinfer.models.hf_names import Place, canonical, places
from jaxinfer.models.step import Step

MANIFEST = "jaxinfer.json"  # stands beside weights whose leaves are not all arrays
_FLOATS = ("float32", "bfloat16", "float16")
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load_config(directory: str | os.PathLike[str], *, max_length: int | None = None) -> ModelConfig:
    """The ModelConfig of a directory's `config.json`. Raises CheckpointError or ConfigError naming the file."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no config.json, so this is not a model directory")
    hf = read_json(file)
    text = hf.get("text_config")
    if hf.get("model_type") == "gemma3" and isinstance(text, dict):  # its language model; images are not served
        hf = {**_GEMMA3_TEXT, **text, "tie_word_embeddings": hf.get("tie_word_embeddings", True)}
    try:
        return config_from_hf(hf, max_length=max_length)
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from None


def load_directory(
    directory: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    shardings: Any = None,
    max_length: int | None = None,
    on_leaf: Callable[[str, jax.Array], Any] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """`(config, params)` of a Hugging Face directory, or of one that `save_directory` wrote with `leaves="native"`.

    `dtype` of the params: "float32", "bfloat16", "float16", "stored", or "auto", which is float32 on CPU (bfloat16
    products are ten times slower there) and bfloat16 elsewhere. `shardings`: None (the default device), one
    `jax.sharding.Sharding` for all, or a tree of them shaped like params. `on_leaf(path, array)` replaces each param
    as soon as it is placed, so that a quantized model never stands whole in its full size. Raises one CheckpointError
    that names every missing, extra or misshapen tensor (the first few of each), with file and shapes.
    """
    directory = Path(directory)
    config = load_config(directory, max_length=max_length)
    weights = open_weights(directory)
    by_path = _shardings(shardings, _abstract(config))
    if (directory / MANIFEST).is_file():
        return config, _load_native(config, directory, weights, dtype, by_path, on_leaf)
    rows, names = checked_places(config, weights)
    params = {}
    for row in rows:
        source = source_of(weights, row, names)
        array = _place(row.path, source, _dtype(dtype, source.dtype), by_path(row.path))
        params[row.path] = array if on_leaf is None else on_leaf(row.path, array)
    return config, unflatten_dict(params, sep="/")


def checked_places(config: ModelConfig, weights: Weights) -> tuple[list[Place], dict[str, str]]:
    """Where each param lies, and the names in the file of the tensors that places name (`hf_names.canonical`).

    Raises one CheckpointError for all that is missing, extra or misshapen.
    """
    rows = places(config, {path: leaf.shape for path, leaf in _abstract(config).items()})
    names = canonical(weights)
    _check(config, weights, rows, names)
    return rows, names


def save_directory(
    config: ModelConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    leaves: Literal["refuse", "materialize", "native"] = "refuse",
    max_shard_size: int = 5 * 2**30,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write `config.json`, `generation_config.json` and the weights so that transformers loads them; the files written.

    `dtype` converts ("float32", "bfloat16", "float16"; None keeps each param's). Quantized and LoRA leaves exist in no
    Hugging Face format: `leaves="materialize"` writes what they stand for as plain tensors, `"native"` writes
    their own arrays and a manifest, which only jaxinfer reads; by default they are refused. `tokenizer_from` names a
    directory whose tokenizer files are copied along. Streams: one tensor is in host memory at a time.
    """
    directory = Path(directory)
    _dtype(dtype or "stored", np.dtype(np.float32))
    flat = dict(quant.leaves(params))
    special = [
        path for path, leaf in flat.items() if not hasattr(leaf, "addressable_shards") and hasattr(leaf, "map_axes")
    ]
    if special and leaves == "refuse":
        raise InputError(
            f"{special[0]} and {len(special) - 1} more params are {type(flat[special[0]]).__name__} leaves, for which "
            'Hugging Face has no format; pass leaves="materialize" for plain tensors or leaves="native" for their own'
        )
    _check_params(config, flat)
    native = bool(special) and leaves == "native"
    manifest = None
    if native:
        arrays, manifest = quant.flatten(params)
        entries = [_entry(name, [array], None, _keep(dtype, array, "." in name)) for name, array in arrays.items()]
    else:
        entries = _entries(config, flat, dtype)
    files = save(directory, entries, max_shard_size=max_shard_size, metadata={"format": "jaxinfer" if native else "pt"})
    if jax.process_index() == 0:
        files += _write_beside(config, directory, dtype or str(flat["embedding"].dtype), manifest, tokenizer_from)
    return files


def _abstract(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return dict(quant.leaves(nn.unbox(Step(config).abstract())))


def _shardings(shardings: Any, shapes: Mapping[str, Any]) -> Callable[[str], Any]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    flat, _ = quant.flatten(shardings) if isinstance(shardings, Mapping) else ({}, None)
    missing = [path for path in shapes if path not in flat and not any(name.startswith(path + ".") for name in flat)]
    if missing:
        raise InputError(f"shardings must be a Sharding or a tree like params; {missing[0]!r} is not in it")
    return flat.__getitem__


def _dtype(asked: str, stored: np.dtype) -> np.dtype:
    if asked == "stored":
        return stored
    if asked == "auto":
        asked = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if asked not in _FLOATS:
        raise InputError(f"dtype {asked!r} is not known; known: auto, stored, {', '.join(_FLOATS)}")
    return np.dtype(getattr(jnp, asked))


def _check(config: ModelConfig, weights: Weights, rows: Sequence[Place], names: Mapping[str, str]) -> None:
    """One error for all that does not fit, so that a wrong directory is understood at once."""
    wanted = {name: row.stored for row in rows for name in row.names}
    if config.tie_embeddings:
        names = {n: found for n, found in names.items() if n != "lm_head.weight" or n in wanted}
    missing = [f"{name!r} {shape}" for name, shape in wanted.items() if name not in names]
    extra = [f"{names[n]!r} {weights.tensors[names[n]].shape}" for n in names if n not in wanted]
    wrong = []
    for name, shape in wanted.items():
        info = weights.tensors.get(names.get(name, ""))
        if info is not None and info.shape != shape:
            wrong.append(f"{info.name!r} in {info.file.name} is {info.shape}, the config needs {shape}")
        elif info is not None and info.dtype.kind not in "fV":
            wrong.append(f"{info.name!r} in {info.file.name} is {info.dtype}, a float type is needed")
    kinds = {"missing": missing, "misshapen": wrong, "not in this architecture": extra}
    problems = [f"{len(found)} {kind}: {'; '.join(found[:4])}" for kind, found in kinds.items() if found]
    if problems:
        what = f"tensors do not match config.json ({config.family}, {config.num_layers} layers)"
        raise CheckpointError(f"{weights.path}: {what}: {'. '.join(problems)}")


def source_of(weights: Weights, row: Place, names: Mapping[str, str]) -> Source:
    """A param as a view of the map: cut out of what is fused, transposed, stacked; nothing is copied."""
    views = [weights.read(names[name]) for name in row.names]
    if row.rows is not None:
        views = [view[row.rows[0] : row.rows[1]] for view in views]
    if row.transpose:
        views = [view.T for view in views]
    return Stacked(tuple(views)) if row.stacked else views[0]


def _place(path: str, source: Source, dtype: np.dtype, sharding: Any) -> jax.Array:
    try:
        return place(source, dtype=dtype, sharding=sharding)
    except ValueError as e:  # a sharding that does not divide the shape
        raise InputError(f"{path} {tuple(source.shape)} cannot be placed as {sharding}: {e}") from None


def _check_params(config: ModelConfig, flat: Mapping[str, Any]) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in _abstract(config).items()}
    for path in [*shapes, *flat]:
        got = tuple(flat[path].shape) if path in flat else "nothing"
        need = shapes.get(path, "no such param")
        # ExtendedRows adds rows to an embedding: the config must say so before it is saved.
        if got != need:
            raise InputError(f"params do not match the config: {path} is {got}, the config needs {need}")


def _entries(config: ModelConfig, flat: Mapping[str, Any], dtype: str | None) -> list[Entry]:
    rows = places(config, {path: tuple(leaf.shape) for path, leaf in flat.items()})
    fused: dict[str, list[Place]] = {}
    entries = []
    for row in rows:
        kind = _dtype(dtype or "stored", flat[row.path].dtype)
        if row.stacked:
            leaf = flat[row.path]
            entries += [_expert(name, leaf, e, row, kind) for e, name in enumerate(row.names)]
            continue
        blocks = fused.setdefault(row.names[0], [])
        blocks.append(row)
        if row.rows is None or sum(b.shape[-1] for b in blocks) == row.stored[0]:
            ordered = sorted(blocks, key=lambda b: b.rows or (0, 0))
            entries.append(_entry(row.names[0], [flat[b.path] for b in ordered], row, kind))
    return entries


def _entry(name: str, parts: list[Any], row: Place | None, dtype: np.dtype) -> Entry:
    def data() -> np.ndarray:
        arrays = [_fetch(part) for part in parts]
        arrays = [a.T for a in arrays] if row is not None and row.transpose else arrays
        return to_host(arrays[0], dtype) if len(arrays) == 1 else np.concatenate(arrays).astype(dtype)

    return Entry(name, tuple(parts[0].shape) if row is None else row.stored, dtype, data)


def _expert(name: str, leaf: Any, e: int, row: Place, dtype: np.dtype) -> Entry:
    def data() -> np.ndarray:
        one = _fetch(ops.materialize(leaf)[e])
        return to_host(one.T if row.transpose else one, dtype)

    return Entry(name, row.stored, dtype, data)


def _fetch(leaf: Any) -> np.ndarray:
    array = ops.materialize(leaf)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _keep(dtype: str | None, array: Any, inside: bool) -> np.dtype:
    """Arrays inside a leaf keep their type: codes and scales are the format."""
    return np.dtype(array.dtype) if inside else _dtype(dtype or "stored", np.dtype(array.dtype))


def _write_beside(
    config: ModelConfig,
    directory: Path,
    dtype: str,
    manifest: dict[str, Any] | None,
    tokenizer_from: str | os.PathLike[str] | None,
) -> list[Path]:
    if tokenizer_from is not None:
        for name in _BESIDE:
            source = Path(tokenizer_from) / name
            if source.is_file() and source.resolve() != (directory / name).resolve():
                shutil.copyfile(source, directory / name)
    if manifest is None:
        (directory / MANIFEST).unlink(missing_ok=True)
    else:
        write_json(directory / MANIFEST, manifest)
    hf = config_to_hf(config, dtype=dtype)
    generation = {"bos_token_id": config.bos, "eos_token_id": list(config.eos) or None}
    write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    write_json(directory / "config.json", hf)
    return [directory / "generation_config.json", directory / "config.json"]


def _load_native(
    config: ModelConfig,
    directory: Path,
    weights: Weights,
    dtype: str,
    by_path: Callable[[str], Any],
    on_leaf: Callable[[str, jax.Array], Any] | None,
) -> dict[str, Any]:
    manifest = read_json(directory / MANIFEST)
    abstract = {name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in weights.tensors.items()}
    try:
        quant.unflatten(abstract, manifest)  # a wrong manifest is told before anything is placed
        arrays = {}
        for name in weights:
            view = weights.read(name)
            kind = view.dtype if "." in name else _dtype(dtype, view.dtype)
            arrays[name] = _place(name, view, kind, by_path(name))
        params = quant.unflatten(arrays, manifest)
        flat = dict(quant.leaves(params))
        _check_params(config, flat)
    except (CheckpointError, InputError) as e:
        raise CheckpointError(f"{directory}: {e}") from None
    return params if on_leaf is None else quant.map_leaves(on_leaf, params)


# What Gemma3TextConfig takes for granted and published multi-modal configurations leave out.
_GEMMA3_TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
