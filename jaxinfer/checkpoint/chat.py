"""Chat templates: messages to one prompt, by the Jinja template that a checkpoint ships.

A template is code that came with the weights, so it runs in Jinja's immutable sandbox, and within a budget that the
sandbox does not have: loop turns, calls, and characters joined are counted, and sizes handed to strings are bounded.
Variables, filters and whitespace rules are those of Hugging Face's `apply_chat_template`.

Stability: experimental.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from jaxinfer.checkpoint.safetensors_io import read_json
from jaxinfer.checkpoint.sandbox import BudgetExceeded, Environment
from jaxinfer.errors import CheckpointError, InputError

MAX_TEMPLATE = 1_000_000  # characters; the longest published ones have about 30,000


class _Raised(jinja2.TemplateError):
    """A template's own complaint about the messages (`raise_exception`)."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The compiled templates of a checkpoint, by name ("default", and sometimes "tool_use").

    `origin` names the file in errors; `special_tokens` are variables of every rendering.
    """

    templates: Mapping[str, jinja2.Template]
    origin: str
    special_tokens: Mapping[str, str]

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], *, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate | None:
        """The templates of a directory, or None if it has none (a base model). CheckpointError if they are broken.

        chat_template.jinja and additional_chat_templates/*.jinja come before the entry in tokenizer_config.json.
        """
        directory = Path(directory)
        file = directory / "chat_template.jinja"
        sources = {"default": _read(file)} if file.is_file() else {}
        for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            sources[extra.stem] = _read(extra)
        if not sources:
            file = directory / "tokenizer_config.json"
            sources = _from_config(file, read_json(file).get("chat_template")) if file.is_file() else {}
        return cls.compile(sources, origin=str(file), special_tokens=special_tokens) if sources else None

    @classmethod
    def compile(
        cls,
        sources: Mapping[str, str],
        *,
        origin: str = "chat template",
        special_tokens: Mapping[str, str] | None = None,
    ) -> ChatTemplate:
        """Compile named template texts. Raises CheckpointError with the line of a syntax error."""
        environment = _environment()
        compiled = {name: _compile(environment, text, f"{origin} ({name})") for name, text in sources.items()}
        return cls(MappingProxyType(compiled), origin, MappingProxyType(dict(special_tokens or {})))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        name: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, each `{"role": ..., "content": ...}`. Encode it without special tokens.

        `name` picks a template; by default "tool_use" with tools where there is one, else "default". `variables` are
        the template's own switches (`enable_thinking`, ...). Content given as a list of text parts is joined. Raises
        InputError for messages that the template refuses and for a template that fails on them.
        """
        template = self._pick(name, bool(tools))
        context = {
            **self.special_tokens,
            "tools": tools and list(tools),
            "documents": documents and list(documents),
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
            "messages": [_message(i, m) for i, m in enumerate(_list(messages))],
        }
        try:
            return template.render(**copy.deepcopy(context))
        except _Raised as e:
            raise InputError(f"the chat template refuses the messages: {str(e)[:500]}") from None
        except BudgetExceeded as e:
            raise CheckpointError(f"{self.origin}: the chat template {e}") from None
        except RecursionError:
            raise CheckpointError(f"{self.origin}: the chat template recurses without end") from None
        except jinja2.exceptions.SecurityError as e:
            raise CheckpointError(f"{self.origin}: the sandbox forbids its chat template: {str(e)[:300]}") from None
        except Exception as e:  # any error of the template's expressions: TypeError, UndefinedError, KeyError, ...
            what = f"{type(e).__name__}: {str(e)[:300]}"
            raise InputError(f"the chat template of {self.origin} fails on these messages: {what}") from None

    def _pick(self, name: str | None, tools: bool) -> jinja2.Template:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise InputError(f"{self.origin} has no chat template {name!r}; it has {', '.join(sorted(self.templates))}")
        return self.templates[name]


def _list(messages: Any) -> list[Any]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages must be a non-empty list of {role, content} objects")
    return list(messages)


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"messages[{i}] must be an object with a text role, got {str(message)[:80]!r}")
    content = message.get("content")
    if isinstance(content, list):
        texts = [p["text"] for p in content if isinstance(p, dict) and p.get("type") == "text" and "text" in p]
        if len(texts) < len(content) or not all(isinstance(t, str) for t in texts):
            raise InputError(f"messages[{i}]: only text parts are supported, {{'type': 'text', 'text': ...}}")
        return {**message, "content": "".join(texts)}
    if content is not None and not isinstance(content, str):
        raise InputError(f"messages[{i}]: content must be text or a list of text parts, got {type(content).__name__}")
    return dict(message)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from None


def _from_config(file: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = value if isinstance(value, list) else [value]
    if not all(isinstance(v, dict) and all(isinstance(v.get(k), str) for k in ("name", "template")) for v in named):
        raise CheckpointError(f"{file}: chat_template must be text or a list of {{name, template}}")
    return {v["name"]: v["template"] for v in named}


def _compile(environment: Environment, text: str, where: str) -> jinja2.Template:
    if len(text) > MAX_TEMPLATE:
        raise CheckpointError(f"{where}: {len(text)} characters, at most {MAX_TEMPLATE} are read")
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        raise CheckpointError(f"{where}: line {e.lineno}: {e.message}") from None
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply") from None
    except (SyntaxError, ValueError, MemoryError, OverflowError, jinja2.TemplateError) as e:
        raise CheckpointError(f"{where}: does not compile: {type(e).__name__}: {str(e)[:200]}") from None


def _environment() -> Environment:
    environment = Environment()
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
