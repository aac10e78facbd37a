"""Adapters on disk: `adapter_config.json` beside `adapter_model.safetensors`, in PEFT's format where it has one.

LoRA over a family's plain matrices is written as `peft` writes it (names, [out, in] factors, rank and alpha patterns)
and loads there; adapters that `peft` trained load here. All else (other kinds; a tied embedding, whose head `peft`
would leave out; a part of a fused tensor; experts) is written as the leaves' own arrays with a manifest, under the
type `JAXINFER`, which only jaxinfer reads. A digest of the target's embedding goes along, so that an adapter is not
put over another model of the same shape.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint

Stability: experimental.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer import quant
from jaxinfer.checkpoint.safetensors_io import Weights, open_weights, read_json
from jaxinfer.checkpoint.safetensors_save import Entry, write_file, write_json
from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.heads.files import embedding_digest
from jaxinfer.models.hf_names import Place, places

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
OURS = "JAXINFER"
PREFIX = "base_model.model."
DIGEST = "jaxinfer_embedding"
# Settings of a PEFT adapter under which it is more than LoRA, and what they are when it is not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
}


def holds_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder is an adapter's."""
    return (Path(directory) / CONFIG).is_file()


def save_adapter(
    config: ModelConfig, params: Any, directory: str | os.PathLike[str], *, base_name: str | None = None
) -> list[Path]:
    """Writes the adapters of `params` (not their bases) and returns the files; in PEFT's format where it can hold them.

    `base_name`: the model that they belong to, as `peft` should find it. Raises InputError where there is no adapter.
    """
    directory = Path(directory)
    found = quant.adapters(params)
    if not found:
        raise InputError("save_adapter: got params without an adapter")
    digest = embedding_digest(quant.detach(params))
    peft = _as_peft(config, params, found)
    arrays, record = _as_ours(found) if peft is None else peft
    entries = [Entry(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]
    metadata = {"format": "pt"} | ({} if digest is None else {DIGEST: digest})
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{ARRAYS}.{os.getpid()}.tmp"
    try:
        write_file(temporary, entries, metadata=metadata)
        (directory / CONFIG).unlink(missing_ok=True)  # never an old description beside new arrays
        os.replace(temporary, directory / ARRAYS)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(directory / CONFIG, {"base_model_name_or_path": base_name, **record})
    return [directory / CONFIG, directory / ARRAYS]


def load_adapter(config: ModelConfig, params: Any, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """`params` with the adapters of a folder over them, float32.

    Raises CheckpointError naming file and tensor where the folder is damaged, ConfigError where it is of another kind
    of adapter than we have or was trained on another model.
    """
    directory = Path(directory)
    if not holds_adapter(directory):
        raise CheckpointError(f"{directory}: no {CONFIG}, so this is not an adapter's folder")
    record, weights = read_json(directory / CONFIG), open_weights(directory / ARRAYS)
    kind = record.get("peft_type")
    if kind == OURS:
        found = _from_ours(directory, record, weights)
    elif kind == "LORA":
        found = _from_peft(config, params, directory, record, weights)
    else:
        raise ConfigError(f"{directory / CONFIG}: peft_type {kind!r} is not known; known: LORA, {OURS}")
    digest, own = weights.metadata.get(DIGEST), embedding_digest(quant.detach(params))
    if digest is not None and own is not None and digest != own:
        raise ConfigError(f"{directory}: the adapter was trained on another model (its embedding differs)")
    try:
        return quant.attach(params, found)
    except InputError as error:
        raise ConfigError(f"{directory}: the adapter is for another model: {error}") from None


def _as_ours(found: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, manifest = quant.flatten(found)
    return {name: np.asarray(array) for name, array in arrays.items()}, {"peft_type": OURS, "manifest": manifest}


def _from_ours(directory: Path, record: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    manifest = record.get("manifest")
    if not isinstance(manifest, Mapping):
        raise CheckpointError(f"{directory / CONFIG}: no manifest in it")
    try:
        return quant.unflatten({name: jnp.asarray(weights.read(name)) for name in weights}, manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _as_peft(config: ModelConfig, params: Any, found: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays and record in PEFT's format; None where it has no form for what is there."""
    flat = dict(quant.leaves(found))
    where = _places(config, params)
    if not all(isinstance(leaf, quant.LoraArray) and _plain(config, where[path]) for path, leaf in flat.items()):
        return None
    arrays, ranks, alphas = {}, {}, {}
    for path, leaf in flat.items():
        module = where[path].names[0].removesuffix(".weight")
        ranks[module], alphas[module] = leaf.a.shape[-1], leaf.scale * leaf.a.shape[-1]
        one, two = ("lora_embedding_A", "lora_embedding_B") if _is_table(path) else ("lora_A.weight", "lora_B.weight")
        arrays[f"{PREFIX}{module}.{one}"] = np.ascontiguousarray(np.asarray(leaf.a, np.float32).T)
        arrays[f"{PREFIX}{module}.{two}"] = np.ascontiguousarray(np.asarray(leaf.b, np.float32).T)
    rank, alpha = (max(values.values(), key=list(values.values()).count) for values in (ranks, alphas))
    return arrays, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
    }


def _places(config: ModelConfig, params: Any) -> dict[str, Place]:
    shapes = {path: tuple(leaf.shape) for path, leaf in quant.leaves(params)}
    return {place.path: place for place in places(config, shapes)}


def _plain(config: ModelConfig, place: Place) -> bool:
    tied = config.tie_embeddings and place.path == "embedding"
    return not (place.stacked or place.rows is not None or tied)


def _is_table(path: str) -> bool:
    return path == "embedding"


def _from_peft(
    config: ModelConfig, params: Any, directory: Path, record: Mapping[str, Any], weights: Weights
) -> dict[str, Any]:
    odd = [f"{name}={record[name]!r}" for name, plain in _PLAIN.items() if record.get(name) not in plain]
    if odd:
        raise ConfigError(f"{directory / CONFIG}: more than LoRA: {', '.join(odd)}; accepted: plain LoRA of matrices")
    rest = set(weights) - _unchanged(config, params, weights)
    found = []
    for path, place in _places(config, params).items():
        module = place.names[0].removesuffix(".weight")
        suffixes = ("lora_embedding_A", "lora_embedding_B") if _is_table(path) else ("lora_A.weight", "lora_B.weight")
        names = [f"{PREFIX}{module}.{suffix}" for suffix in suffixes]
        if place.stacked or names[0] not in weights:
            continue
        if config.tie_embeddings and _is_table(path):
            raise ConfigError(f"{directory}: adapts the embedding, but not the head that is tied to it: not supported")
        rest -= set(names)
        a, b = (jnp.asarray(weights.read(name), jnp.float32).T for name in names)
        if place.rows is not None:  # a part of a fused tensor has the whole's first factor and its own rows
            b = b[:, slice(*place.rows)]
        leaf = quant.LoraArray(None, a, b, _scale(record, module, a.shape[-1], directory))
        try:
            leaf.check()
        except InputError as error:
            raise CheckpointError(f"{directory / ARRAYS}: {module}: {error}") from None
        found.append((path, leaf))
    if rest or not found:
        what = f"tensors {sorted(rest)[:3]} adapt no matrix of this model" if rest else "no adapter in it"
        raise CheckpointError(f"{directory / ARRAYS}: {what}")
    return quant.build(found)


def _unchanged(config: ModelConfig, params: Any, weights: Weights) -> set[str]:
    """Names of the model's own weights in the file: `peft` copies embedding and head along where one is adapted."""
    bases, found = dict(quant.leaves(quant.detach(params))), set()
    for path, place in _places(config, params).items():
        module = place.names[0].removesuffix(".weight")
        for name in (f"{PREFIX}{module}.weight", f"{PREFIX}{module}.base_layer.weight"):
            base = bases[path]
            if name not in weights or place.stacked or place.rows is not None or hasattr(base, "map_axes"):
                continue
            theirs = weights.read(name)
            ours = np.asarray(base).T if place.transpose else np.asarray(base)
            if theirs.shape == ours.shape and np.array_equal(theirs.astype(ours.dtype), ours):
                found.add(name)
    return found


def _scale(record: Mapping[str, Any], module: str, rank: int, directory: Path) -> float:
    alpha = _pattern(record.get("alpha_pattern") or {}, module, record.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{directory / CONFIG}: lora_alpha of {module} must be a number, got {json.dumps(alpha)}")
    return float(alpha) / (rank**0.5 if record.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    matching: Sequence[Any] = [v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
    return matching[0] if matching else default
