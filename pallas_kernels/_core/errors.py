"""What a kernel raises on purpose. The package imports jax only, so these are its own; both are ValueErrors.

Stability: experimental.
"""


class ArgumentError(ValueError):
    """An argument that no form of the op takes; the message names it, what it got and what it accepts."""


class UnsupportedError(ValueError):
    """A form that was asked for by name and cannot serve this call here; the message says why."""


def argument_error(op: str, name: str, got: object, accepts: str) -> ArgumentError:
    """The error of a bad argument, in the one wording that all ops use."""
    return ArgumentError(f"{op}: {name}: got {got}, accepts {accepts}")
