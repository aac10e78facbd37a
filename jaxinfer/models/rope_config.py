"""RoPE settings of Hugging Face configs, old and new spelling, to `Rope` and back.

Old files have `rope_theta` and `rope_scaling`; files of transformers 5 have `rope_parameters`, per layer type where
types differ (Gemma 3).

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.ops.position import SCALINGS, Rope, frequencies

LAYER_TYPES = ("full_attention", "sliding_attention")
# Hugging Face key -> Rope field
FIELDS = {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(hf: Mapping[str, Any], head_dim: int, *, layer_type: str = "full_attention") -> Rope:
    """The rotation of one layer type. Raises ConfigError for an unknown or incomplete scaling."""
    settings = _settings(hf, layer_type)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in SCALINGS:
        raise ConfigError(f"rope_type {kind!r} is not known; known: {', '.join(SCALINGS)}")
    for name in REQUIRED.get(kind, ()):
        if settings.get(name) is None:
            raise ConfigError(f"rope_type {kind!r} needs {name!r}; it has {sorted(settings)}")
    longest = _number(hf.get("max_position_embeddings", 2048), "max_position_embeddings")
    original = settings.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or longest
    if _number(original, "original_max_position_embeddings") <= 0:
        raise ConfigError(f"original_max_position_embeddings must be positive, got {original!r}")
    if kind == "dynamic":
        original = longest
    fields = {ours: settings[key] for key, ours in FIELDS.items() if settings.get(key) is not None}
    for name, value in fields.items():
        if name != "truncate":
            fields[name] = float(_number(value, name))
    if kind == "longrope":
        if settings.get("factor") is None:
            fields["factor"] = longest / original
        for name in ("short_factor", "long_factor"):
            if not isinstance(settings[name], list | tuple):
                raise ConfigError(f"{name} must be a list of numbers, got {settings[name]!r}")
            fields[name] = tuple(float(_number(x, name)) for x in settings[name])
    partial = settings.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    theta = settings.get("rope_theta", hf.get("rope_theta", 10000.0))
    return Rope(
        rotary_dim=int(head_dim * _number(partial, "partial_rotary_factor")),
        theta=float(_number(theta, "rope_theta")),
        scaling=kind,
        # Kept where it has a meaning, so that configs that rotate alike are equal.
        original_length=0
        if kind in ("default", "linear")
        else int(_number(original, "original_max_position_embeddings")),
        **fields,
    )


def _settings(hf: Mapping[str, Any], layer_type: str) -> Mapping[str, Any]:
    settings = hf.get("rope_parameters")
    if settings is None:
        settings = hf.get("rope_scaling") or {}
        if layer_type == "sliding_attention" and "rope_local_base_freq" in hf:
            return {"rope_theta": hf["rope_local_base_freq"]}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"rope settings must be an object, got {settings!r}")
    if any(name in settings for name in LAYER_TYPES):
        settings = settings.get(layer_type) or settings.get("full_attention") or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"rope settings of a layer type must be an object, got {settings!r}")
    return settings


def check_rotations(config: ModelConfig) -> None:
    """Raise ConfigError where a layer's settings give no frequencies: a base of zero, tables of the wrong length."""
    for rope in set(config.ropes):
        if rope is None:
            continue
        if not isinstance(rope.rotary_dim, int) or not 0 < rope.rotary_dim <= config.head_dim:
            raise ConfigError(f"RoPE turns {rope.rotary_dim} entries of heads that have {config.head_dim}")
        served = dataclasses.replace(rope, length=config.max_length)
        try:
            with np.errstate(all="raise"):
                inverse, scale = frequencies(served)
        except (ArithmeticError, ValueError, TypeError) as e:
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(f"the RoPE settings give no frequencies ({e}): {_shown(rope)}") from None
        if not (np.isfinite(inverse).all() and (inverse >= 0).all() and 0 < scale < float("inf")):
            raise ConfigError(f"the RoPE settings give no frequencies: {_shown(rope)}")


def _shown(rope: Rope) -> str:
    return ", ".join(f"{f.name}={getattr(rope, f.name)}" for f in dataclasses.fields(rope))[:300]


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` object of one Rope."""
    defaults = Rope(rope.rotary_dim)
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.scaling}
    for key, name in FIELDS.items():
        if getattr(rope, name) != getattr(defaults, name) or name in REQUIRED.get(rope.scaling, ()):
            out[key] = getattr(rope, name)
    if rope.scaling == "longrope":
        out |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.scaling in ("yarn", "llama3", "longrope"):
        out["original_max_position_embeddings"] = rope.original_length
    if rope.rotary_dim != head_dim:
        out["partial_rotary_factor"] = rope.rotary_dim / head_dim
    return out


def legacy(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The same under the keys that transformers 4 reads: `rope_theta`, `rope_scaling`."""
    scaling = write_rope(rope, head_dim)
    out = {"rope_theta": scaling.pop("rope_theta")}
    if "partial_rotary_factor" in scaling:
        out["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    return out | ({"rope_scaling": scaling} if rope.scaling != "default" else {})


def _number(value: Any, name: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise ConfigError(f"{name} must be a number, got {value!r}")
    return value


def same_rotation(ropes: tuple[Rope | None, ...]) -> bool:
    """Whether all layers rotate alike."""
    return len({dataclasses.replace(r, length=0) if r else None for r in ropes}) <= 1
