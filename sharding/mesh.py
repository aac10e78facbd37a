"""Meshes: from `tensor=4,data=2` to devices, with an error that lists what would fit where that does not.

Each axis has one meaning: `data` splits the rows of the batch, `fsdp` rows and weights, `stage` the layers, `expert` a
mixture's experts and rows, `context` the tokens of a row, `tensor` heads and MLP columns. A mesh lays its axes out in
that order, so that `tensor`, which talks most, has neighbouring devices. Axis types are always stated. Machinery.

Stability: experimental.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxinfer.errors import ConfigError

AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")
ROWS = ("data", "fsdp", "expert")  # the axes that split a batch


def parse(text: str) -> dict[str, int]:
    """`"tensor=4,data=2"` as `{"data": 2, "tensor": 4}`, in the mesh's order. Raises ConfigError for anything else."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ConfigError(
                f"mesh {text!r}: got {part.strip()!r}; accepted: NAME=SIZE with NAME of {', '.join(AXES)}"
            )
        if name in found:
            raise ConfigError(f"mesh {text!r}: axis {name!r} is there twice")
        found[name] = int(size)
    return {name: found[name] for name in AXES if name in found}


def describe(axes: Mapping[str, int]) -> str:
    """The axes as `parse` reads them: `data=2,tensor=4`."""
    return ",".join(f"{name}={axes[name]}" for name in AXES if name in axes)


def make_mesh(
    axes: Mapping[str, int],
    config: Any = None,
    *,
    batch: int | None = None,
    devices: Sequence[Any] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh of `axes` on the first `devices` (None: all that there are); its axes are Auto, or Explicit.

    `config` (a `ModelConfig`) and `batch` rows are checked too, where they are given. Raises ConfigError as `check`.
    """
    devices = jax.devices() if devices is None else list(devices)
    check(axes, config, batch=batch, devices=len(devices))
    named = {name: axes[name] for name in AXES if name in axes}
    kind = AxisType.Explicit if explicit else AxisType.Auto
    count = math.prod(named.values())
    return jax.make_mesh(
        tuple(named.values()), tuple(named), axis_types=(kind,) * len(named), devices=devices[:count]
    )  # fmt: skip


def check(axes: Mapping[str, int], config: Any = None, *, batch: int | None = None, devices: int | None = None) -> None:
    """Raises ConfigError, which lists what would fit, for axes that a model, a batch or the devices do not allow."""
    what = f"mesh {describe(axes)}"
    if unknown := [name for name in axes if name not in AXES]:
        raise ConfigError(f"mesh axis {unknown[0]!r} is unknown; accepted: {', '.join(AXES)}")
    for name, size in axes.items():
        refused = _refusal(name, size, config)
        if refused:
            fit = [n for n in range(1, (devices or 64) + 1) if not _refusal(name, n, config)]
            accepted = f"{name}={'|'.join(map(str, fit))}" if fit else f"no {name} axis"
            raise ConfigError(f"{what}: {refused}; would fit: {accepted}")
    count = math.prod(axes.values())
    if devices is not None and count > devices:
        raise ConfigError(
            f"{what}: takes {count} devices, there are {devices}; would fit: {_examples(config, devices, batch)}"
        )
    rows = math.prod(axes.get(name, 1) for name in ROWS)
    if batch is not None and batch % rows:
        split = "*".join(name for name in ROWS if axes.get(name, 1) > 1)
        fit = [n for n in range(1, batch + 1) if batch % n == 0 and n <= (devices or batch)]
        accepted = f"{split} of {'|'.join(map(str, fit))}, or a batch of {rows * max(1, round(batch / rows))}"
        raise ConfigError(f"{what}: a batch of {batch} rows cannot be split {rows} ways; would fit: {accepted}")


def fitting(
    config: Any, devices: int, *, batch: int | None = None, names: Sequence[str] = AXES
) -> list[dict[str, int]]:
    """Every mesh of `names` that uses all `devices` and that the model and the batch allow; sizes of 1 are left out."""
    found: list[dict[str, int]] = []

    def extend(left: int, rest: Sequence[str], axes: dict[str, int]) -> None:
        if left == 1 or not rest:
            if left == 1:
                found.append(axes)
            return
        for size in (n for n in range(1, left + 1) if left % n == 0):
            if size == 1 or not _refusal(rest[0], size, config):
                extend(left // size, rest[1:], axes | ({rest[0]: size} if size > 1 else {}))

    extend(devices, [name for name in AXES if name in names], {})
    rows = [math.prod(axes.get(name, 1) for name in ROWS) for axes in found]
    return [axes for axes, n in zip(found, rows, strict=True) if batch is None or batch % n == 0]


def _examples(config: Any, devices: int, batch: int | None) -> str:
    """A few meshes of as many of the devices as can be used, those of one axis first."""
    for count in range(devices, 0, -1):
        found = sorted(fitting(config, count, batch=batch), key=len)
        if found:
            return " or ".join(describe(axes) or "no mesh" for axes in found[:6])
    return "no mesh"


def _refusal(name: str, size: int, c: Any) -> str | None:
    """Why a model cannot be split so, or None."""
    if c is None or size == 1:
        return None
    lengths: dict[str, int] = {}
    match name:
        case "tensor":
            lengths = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads}
            if any(not c.is_sparse(i) for i in range(c.num_layers)):
                lengths["mlp_size"] = c.mlp_size
            if c.num_experts:
                lengths["expert_size"] = c.expert_size
        case "expert":
            if not c.num_experts:
                return "the model has no experts"
            lengths = {"num_experts": c.num_experts}
        case "fsdp":
            lengths = {"hidden_size": c.hidden_size}
        case "stage":
            if size > c.num_layers:
                return f"num_layers is {c.num_layers}, too few for {size} stages"
    bad = next((field for field, length in lengths.items() if length % size), None)
    return None if bad is None else f"{bad} is {lengths[bad]}, which {size} parts of {name!r} do not divide"
