"""Dispatch: an op has several forms; this picks the one that serves a call, at trace time, from shapes alone.

A form is a frozen `Form`: its name, the platform whose code it is (None: runs anywhere), the function, and `refuses`,
which says why it cannot serve a call or None. With `impl=None` the first form of each platform that does not refuse is
taken and the last resort is the form that runs anywhere; the program that XLA lowers holds one of them, chosen by the
platform it is lowered for. An `impl` given by name is taken or raises its reason: nothing falls back in silence.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import lax

from jaxinfer.pallas_kernels._core.check import choice
from jaxinfer.pallas_kernels._core.errors import UnsupportedError

PLATFORMS = ("cpu", "tpu", "cuda")


def never(call: Any) -> str | None:
    """`refuses` of a form that serves every valid call."""
    return None


@dataclasses.dataclass(frozen=True)
class Form:
    """One implementation of an op: `run(call, *arrays)` where `call` is the op's own frozen record of static things.

    `refuses(call)`: why this form cannot serve, or None. `automatic`: whether `impl=None` may choose it (the reference
    never is).
    """

    name: str
    run: Callable[..., Any]
    platform: str | None = None
    refuses: Callable[[Any], str | None] = never
    automatic: bool = True


def dispatch(op: str, forms: Sequence[Form], call: Hashable, *arrays: Any, impl: str | None = None) -> Any:
    """Run `arrays` through the form named `impl`, or through what fits where it will run.

    `forms` in order of preference. Raises ArgumentError for an unknown `impl`, UnsupportedError with the form's reason
    where it cannot serve.
    """
    if impl is not None:
        form = named(op, forms, impl)
        if reason := form.refuses(call):
            raise UnsupportedError(f"{op}: impl={impl!r} cannot serve this call: {reason}")
        return form.run(call, *arrays)
    default = choose(forms, call, None)
    if default is None:
        raise UnsupportedError(f"{op}: no form runs anywhere: {why_not(forms, call, None)}")
    chosen = {platform: choose(forms, call, platform) for platform in PLATFORMS}
    special = {p: _branch(form, call) for p, form in chosen.items() if form is not None and form is not default}
    if not special:
        return default.run(call, *arrays)
    return lax.platform_dependent(*arrays, default=_branch(default, call), **special)


def named(op: str, forms: Sequence[Form], impl: str) -> Form:
    """The form of that name; ArgumentError lists the names there are."""
    table = {form.name: form for form in forms}
    choice(op, "impl", impl, table)
    return table[impl]


def choose(forms: Sequence[Form], call: Any, platform: str | None) -> Form | None:
    """The first automatic form that serves `call` on `platform` (None: on any machine), or None."""
    fitting = (f for f in forms if f.automatic and f.platform in (None, platform) and not f.refuses(call))
    return next(fitting, None)


def why_not(forms: Sequence[Form], call: Any, platform: str | None) -> dict[str, str]:
    """Form name -> why it does not serve `call` on `platform`; for error messages and `jaxinfer doctor`."""
    reasons = {}
    for form in forms:
        if form.platform not in (None, platform):
            reasons[form.name] = f"code for {form.platform}"
        elif reason := form.refuses(call):
            reasons[form.name] = reason
    return reasons


def jax_version() -> tuple[int, ...]:
    """The version of jax as integers, (0, 11, 2)."""
    return tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())


def mosaic_gpu_refuses() -> str | None:
    """Why this jax cannot build Mosaic GPU kernels as they are written here, or None."""
    if jax_version() < (0, 11, 2):
        return f"Mosaic GPU kernels need jax 0.11.2 or newer, this is {jax.__version__}"
    return None


def mosaic_gpu() -> Any:
    """What builds Hopper kernels, imported where one is built: before jax 0.11 the import needs absl. Not typed, since
    it differs between the versions of jax."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def _branch(form: Form, call: Any) -> Callable[..., Any]:
    return lambda *arrays: form.run(call, *arrays)
