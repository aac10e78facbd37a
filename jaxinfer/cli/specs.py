"""Options that name a method with its settings: `draft:gamma=4`, `sink:sinks=4,window=1024`.

A registry maps names to frozen dataclasses; what may be written after the colon is read off the dataclass, so a method
that joins a registry needs no parser of its own.

Stability: internal.
"""

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxinfer.errors import InputError

SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Registry:
    """The names that one option accepts. `entries` maps each to "module:Class", imported when it is asked for; `also`
    are names that the option handles itself, for the error text."""

    option: str
    entries: Mapping[str, str]
    also: tuple[str, ...] = ()

    def kind(self, name: str) -> type:
        """The dataclass of that name."""
        module, _, attribute = self.entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def parse(self, text: str, **supplied: Any) -> Any:
        """An instance from `name` or `name:key=value,key=value`; InputError lists what is accepted.

        `supplied` values go to those fields of the dataclass that have their names and no text form.
        """
        name, colon, rest = text.partition(":")
        if name not in self.entries:
            raise InputError(f"{self.option}: got {text!r}; accepted: {', '.join((*self.also, *self.entries))}")
        kind = self.kind(name)
        accepted = settings(kind)
        given: dict[str, Any] = {}
        for part in rest.split(",") if colon else []:
            key, equals, value = part.partition("=")
            if not equals or key not in accepted or key in given:
                usage = f"{self.usage(name)}, each key once"
                raise InputError(f"{self.option}: got {part!r} in {text!r}; accepted: {usage}")
            given[key] = _value(self.option, key, value, accepted[key])
        fields = {f.name: f for f in dataclasses.fields(kind)}
        missing = [key for key in accepted if _required(fields[key]) and key not in given]
        if missing:
            raise InputError(f"{self.option}: got {text!r} without {', '.join(missing)}; accepted: {self.usage(name)}")
        return kind(**given, **{key: value for key, value in supplied.items() if key in fields and key not in accepted})

    def usage(self, name: str) -> str:
        """How one entry is written, with its defaults: `sink:sinks=4,window=1024`."""
        kind = self.kind(name)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        shown = [f"{k}={_default(fields[k], t[0])}" for k, t in settings(kind).items()]
        return name + (":" + ",".join(shown) if shown else "")


def settings(kind: type) -> dict[str, tuple[type, bool]]:
    """The fields of a dataclass that a command line can set: name to (scalar type, whether `none` is accepted)."""
    found = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = set(typing.get_args(hint)) if union else {hint}
        optional = type(None) in members
        members.discard(type(None))
        if field.init and len(members) == 1 and (scalar := members.pop()) in SCALARS:
            found[field.name] = (scalar, optional)
    return found


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field, scalar: type) -> str:
    if _required(field):
        return SCALARS[scalar].upper().replace(" ", "-")
    return str(field.default).lower() if scalar is bool or field.default is None else str(field.default)


def _value(option: str, key: str, text: str, accepted: tuple[type, bool]) -> Any:
    scalar, optional = accepted
    if optional and text.lower() == "none":
        return None
    try:
        return {"true": True, "false": False}[text.lower()] if scalar is bool else scalar(text)
    except (ValueError, KeyError):
        also = " or none" if optional else ""
        raise InputError(f"{option}: got {key}={text!r}; accepted: {SCALARS[scalar]}{also}") from None
