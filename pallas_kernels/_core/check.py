"""Checks of arguments before anything is traced: ranks, shapes, dtypes, values that are known.

A shape is written as in docstrings, `"B H T d"`: letters that come again must agree, numbers are themselves. `shapes`
returns what the letters stand for, so that an op names its sizes once.

Stability: internal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxinfer.pallas_kernels._core.errors import argument_error

FLOATS = ("float32", "bfloat16", "float16")


def shapes(op: str, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Check `name=(array, "B T d")`, and return the sizes: `{"B": 2, "T": 16, "d": 64}`.

    Raises ArgumentError for a rank or size that does not fit, naming the argument.
    """
    sizes: dict[str, int] = {}
    for name, (array, pattern) in arguments.items():
        letters = pattern.split()
        got = tuple(getattr(array, "shape", ()))
        if not hasattr(array, "shape") or len(got) != len(letters):
            raise argument_error(op, name, _described(array), f"an array [{', '.join(letters)}]")
        for letter, size in zip(letters, got, strict=True):
            want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != want:
                known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k in letters)
                raise argument_error(op, name, list(got), f"[{', '.join(letters)}] with {known or letter}")
    return sizes


def dtypes(op: str, accepts: Sequence[str] = FLOATS, **arrays: Any) -> str:
    """Check that all have one dtype out of `accepts`, and return its name."""
    first: str | None = None
    for name, array in arrays.items():
        got = str(array.dtype)
        if got not in accepts:
            raise argument_error(op, name, got, " or ".join(accepts))
        if first is not None and got != first:
            raise argument_error(op, name, got, f"the dtype of {next(iter(arrays))}, {first}")
        first = got
    assert first is not None
    return first


def integers(op: str, **arrays: Any) -> None:
    """Check for an integer dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise argument_error(op, name, array.dtype, "integers")


def within(op: str, low: int, high: int, **arrays: Any) -> None:
    """Check integer values where they can be read: traced arrays pass, the op must define what it does with them."""
    for name, array in arrays.items():
        if isinstance(array, Tracer | jax.ShapeDtypeStruct):
            continue
        values = np.asarray(array)
        bad = np.argwhere((values < low) | (values > high))
        if len(bad):
            at = tuple(int(i) for i in bad[0])
            raise argument_error(op, f"{name}{list(at)}", values[at], f"{low} to {high}")


def choice(op: str, name: str, got: Any, accepts: Mapping[str, Any] | Sequence[str]) -> None:
    """Check that a word is one of those accepted."""
    if got not in accepts:
        raise argument_error(op, name, repr(got), ", ".join(map(repr, accepts)))


def positive(op: str, **numbers: Any) -> None:
    """Check for integers of at least 1; None passes."""
    for name, got in numbers.items():
        if got is not None and (type(got) is not int or got < 1):
            raise argument_error(op, name, repr(got), "an integer of at least 1")


def _described(array: Any) -> str:
    shape = getattr(array, "shape", None)
    return type(array).__name__ if shape is None else str(list(shape))
