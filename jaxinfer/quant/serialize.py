"""Leaves as named arrays and a JSON manifest, so that any checkpoint format can hold them.

`layers_0/mlp/gate` as int8 becomes the arrays `layers_0/mlp/gate.codes` and `.scales`, and a manifest entry with its
type and static fields. Nothing is pickled: only the types in `TYPES` are ever built. Version 1 had int8 weights alone,
stored in the logical orientation; it is still read.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxinfer.errors import CheckpointError, InputError
from jaxinfer.quant.extended import ExtendedRows
from jaxinfer.quant.hydra import HydraArray
from jaxinfer.quant.lora import LoraArray
from jaxinfer.quant.mixed_rows import MixedRows
from jaxinfer.quant.paca import PacaArray
from jaxinfer.quant.quantized import QuantizedArray
from jaxinfer.quant.soka import SokaArray
from jaxinfer.quant.transposed import TransposedArray
from jaxinfer.quant.tree import build, leaves
from jaxinfer.quant.trit_planes import SumArray

VERSION = 2
TYPES: dict[str, type] = {
    "quantized": QuantizedArray,
    "sum": SumArray,
    "transposed": TransposedArray,
    "mixed_rows": MixedRows,
    "lora": LoraArray,
    "paca": PacaArray,
    "soka": SokaArray,
    "hydra": HydraArray,
    "extended_rows": ExtendedRows,
}
_STATIC = {"int": int, "float": (float, int), "str": str}  # annotation -> what JSON may hold


def flatten(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(arrays, manifest)`: every stored array by name, and what `json.dumps` needs to put them back together.

    Arrays are passed through as they are, so a tree of shardings or `ShapeDtypeStruct` flattens to the same names.
    """
    arrays: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for path, leaf in leaves(params):
        entry = _flatten(path, leaf, arrays)
        if entry is not None:
            entries[path] = entry
    return arrays, {"version": VERSION, "leaves": entries}


def unflatten(arrays: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Raises CheckpointError, naming the path, for an unknown type or version, a missing or spare array, a static field
    of the wrong kind, or arrays that contradict each other.
    """
    version, entries = _field(manifest, "version", "manifest"), _field(manifest, "leaves", "manifest")
    if version not in (1, VERSION) or not isinstance(entries, Mapping):
        raise CheckpointError(f"manifest: version {version!r} is not 1 to {VERSION}, or the manifest is damaged")
    rest = dict(arrays)
    if version == 1:
        entries = {path: _from_version_1(path, entry, rest) for path, entry in entries.items()}
    built = [(path, _unflatten(path, entry, rest)) for path, entry in entries.items()]
    for name in rest:
        if "." in name:
            raise CheckpointError(f"array {name} belongs to no weight of the manifest")
    for path in (*rest, *entries):
        parts = path.split("/")
        above = ["/".join(parts[:i]) for i in range(1, len(parts))]
        if path in rest and path in entries or not all(parts) or any(p in rest or p in entries for p in above):
            raise CheckpointError(f"{path}: named twice, inside another weight, or empty")
    return build([*rest.items(), *built])


def _flatten(name: str, value: Any, arrays: dict[str, Any]) -> dict[str, Any] | None:
    tag = next((tag for tag, kind in TYPES.items() if type(value) is kind), None)
    if tag is None:
        if hasattr(value, "map_axes"):
            raise InputError(f"{name}: {type(value).__name__} is not in quant.serialize.TYPES, so it cannot be saved")
        arrays[name] = value
        return None
    entry: dict[str, Any] = {"type": tag}
    for field in dataclasses.fields(value):
        child = getattr(value, field.name)
        if not field.metadata.get("pytree_node", True):
            entry[field.name] = child
        elif child is None:
            entry[field.name] = None
        else:
            nested = _flatten(f"{name}.{field.name}", child, arrays)
            if nested is not None:
                entry[field.name] = nested
    return entry


def _unflatten(name: str, entry: Any, rest: dict[str, Any]) -> Any:
    kind = TYPES.get(tag) if isinstance(tag := _field(entry, "type", name), str) else None
    if kind is None:
        raise CheckpointError(f"{name}: weight type {tag!r} is not known; known: {', '.join(TYPES)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    spare = [key for key in entry if key != "type" and key not in fields]
    if spare:
        raise CheckpointError(f"{name}: field {spare[0]!r} is not one of {tag}: {', '.join(fields)}")
    values = {key: _value(name, field, entry, rest) for key, field in fields.items()}
    leaf = kind(**values)
    if all(hasattr(array, "shape") for array in jax.tree.leaves(leaf)):
        try:
            leaf.check()
        except InputError as error:
            raise CheckpointError(f"{name}: {error}") from error
    return leaf


def _value(name: str, field: dataclasses.Field, entry: Mapping[str, Any], rest: dict[str, Any]) -> Any:
    child = f"{name}.{field.name}"
    if not field.metadata.get("pytree_node", True):
        value, kind = _field(entry, field.name, name), _STATIC[str(field.type)]
        odd = isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kind) or odd:
            raise CheckpointError(f"{child} must be a {field.type}, got {value!r}")
        return value
    if field.name in entry:
        # An adapter saved alone has no base; a format without zeros, factor or second plane says so.
        absent = entry[field.name] is None and (field.name == "base" or field.default is None)
        return None if absent else _unflatten(child, entry[field.name], rest)
    if child not in rest:
        raise CheckpointError(f"array {child} is missing")
    return rest.pop(child)


def _from_version_1(name: str, entry: Any, rest: dict[str, Any]) -> Any:
    """An entry of version 1 as one of today's, and its arrays in `rest` turned output by output."""
    if not isinstance(entry, Mapping):
        return entry
    if entry.get("type") != "int8":
        return {key: _from_version_1(f"{name}.{key}", value, rest) for key, value in entry.items()}
    for child in (f"{name}.codes", f"{name}.scales") if entry.get("axis") == -2 else ():
        if child in rest:
            rest[child] = rest[child].swapaxes(-1, -2)
    return {**entry, "type": "quantized", "zeros": None, "high": None, "factor": None} | {
        "element": "int8",
        "activations": "float",
    }


def _field(entry: Any, key: str, name: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise CheckpointError(f"{name}: the manifest has no {key!r} here: {str(entry)[:80]}")
    return entry[key]
