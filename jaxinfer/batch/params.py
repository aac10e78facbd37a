"""Sampling parameters: one table from which row validation and command-line options are both made.

Each field of `SamplingParams` carries its kind (type and range) and its help. `SamplingParams.from_json` checks the
parameters of one row; `options()` lists the same words with dashes for a command line, and `from_options` reads
their values. The names are the ones people know from the OpenAI and vLLM interfaces.

Stability: experimental.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxinfer.errors import InputError

MAX_TOKEN_ID = 2**31 - 1
MAX_LIST = 1024
CONSTRAINTS = ("json_schema", "regex", "grammar")


class Unacceptable(Exception):
    """A value outside what a kind accepts (internal: turned into an `InputError` that names the field)."""


class Kind(Protocol):
    """What one parameter accepts: `accepts` in words, `parse` a decoded JSON value into its canonical form."""

    @property
    def accepts(self) -> str: ...

    def parse(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Int:
    """A whole number in [low, high]; 64.0 counts as 64 (columnar files with gaps store integers so)."""

    low: int
    high: int

    @property
    def accepts(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def parse(self, value: Any) -> int:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise Unacceptable
        return value


@dataclass(frozen=True)
class Float:
    """A finite number in [low, high], or (low, high] when `open_low`."""

    low: float
    high: float
    open_low: bool = False

    @property
    def accepts(self) -> str:
        return f"a number {f'above {self.low:g} up' if self.open_low else f'from {self.low:g}'} to {self.high:g}"

    def parse(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Unacceptable
        if not self.low <= value <= self.high or (self.open_low and value == self.low):  # NaN fails here too
            raise Unacceptable
        return float(value)


@dataclass(frozen=True)
class Flag:
    """true or false."""

    accepts: str = "true or false"

    def parse(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise Unacceptable
        return value


@dataclass(frozen=True)
class Count:
    """false / true / a whole number in [0, high]: None, 0 and the number."""

    high: int

    @property
    def accepts(self) -> str:
        return f"true, false or a whole number from 0 to {self.high}"

    def parse(self, value: Any) -> int | None:
        if isinstance(value, bool):
            return 0 if value else None
        return Int(0, self.high).parse(value)


@dataclass(frozen=True)
class Strings:
    """One string or a list of them, none of them empty."""

    most: int = 64
    longest: int = 1000

    @property
    def accepts(self) -> str:
        return f"a string or a list of up to {self.most} strings, each of 1 to {self.longest} characters"

    def parse(self, value: Any) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or len(values) > self.most:
            raise Unacceptable
        for text in values:
            if not isinstance(text, str) or not 1 <= len(text) <= self.longest or not is_text(text):
                raise Unacceptable
        return tuple(values)


@dataclass(frozen=True)
class TokenIds:
    """A list of token ids."""

    most: int = MAX_LIST

    @property
    def accepts(self) -> str:
        return f"a list of up to {self.most} token ids (whole numbers from 0 to {MAX_TOKEN_ID})"

    def parse(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list | tuple) or len(value) > self.most:
            raise Unacceptable
        return tuple(Int(0, MAX_TOKEN_ID).parse(item) for item in value)


@dataclass(frozen=True)
class Bias:
    """An object from token ids (as strings, for JSON) to numbers from -100 to 100."""

    most: int = MAX_LIST

    @property
    def accepts(self) -> str:
        return f"an object of up to {self.most} token ids with numbers from -100 to 100"

    def parse(self, value: Any) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, Mapping) or len(value) > self.most:
            raise Unacceptable
        pairs = {}
        for key, bias in value.items():
            if isinstance(key, str):
                if not (key.isascii() and key.isdigit() and len(key) <= 10):
                    raise Unacceptable
                key = int(key)
            pairs[Int(0, MAX_TOKEN_ID).parse(key)] = Float(-100, 100).parse(bias)
        if len(pairs) != len(value):  # "7" and "07"
            raise Unacceptable
        return tuple(sorted(pairs.items()))


@dataclass(frozen=True)
class Text:
    """A text that is not empty."""

    accepts: str
    longest: int = 2**20

    def parse(self, value: Any) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= self.longest or not is_text(value):
            raise Unacceptable
        return value


@dataclass(frozen=True)
class Schema:
    """A JSON Schema, decoded or as text; its canonical form is JSON text with the keys in their order."""

    accepts: str = "a JSON Schema: an object, true, or their text"
    longest: int = 2**22

    def parse(self, value: Any) -> str:
        try:
            schema = json.loads(value) if isinstance(value, str) else value
            text = json.dumps(schema) if isinstance(schema, Mapping | bool) else ""
        except (ValueError, TypeError, RecursionError):
            raise Unacceptable from None
        if not 1 <= len(text) <= self.longest:
            raise Unacceptable
        return text


@dataclass(frozen=True)
class ResponseFormat:
    """What OpenAI's interface calls `response_format`; its canonical form is () or one schema's text in a tuple."""

    accepts: str = 'an object of type "text", "json_object", or "json_schema" with {"json_schema": {"schema": ...}}'

    def parse(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        given = value if isinstance(value, Mapping) else {}
        if given == {"type": "text"}:
            return ()
        if given == {"type": "json_object"}:
            return (Schema().parse({"type": "object"}),)
        inner = given.get("json_schema")
        if given.keys() != {"type", "json_schema"} or given["type"] != "json_schema" or not isinstance(inner, Mapping):
            raise Unacceptable
        if "schema" not in inner or inner.keys() - {"name", "description", "schema", "strict"}:
            raise Unacceptable
        return (Schema().parse(inner["schema"]),)


def _param(default: Any, kind: Kind, text: str, *, aliases: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"kind": kind, "help": text, "aliases": aliases})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one row is answered. Immutable and hashable; every field is optional in a row and on the command line."""

    max_tokens: int = _param(128, Int(1, MAX_TOKEN_ID), "Most tokens of an answer.", aliases=("max_completion_tokens",))
    min_tokens: int = _param(0, Int(0, MAX_TOKEN_ID), "Tokens before an end-of-text or stop may end the answer.")
    temperature: float = _param(0.0, Float(0, 100), "0 takes the likeliest token; 1 samples the model's law.")
    top_k: int = _param(0, Int(-1, MAX_TOKEN_ID), "Sample among the k likeliest tokens; 0 or -1: all.")
    top_p: float = _param(1.0, Float(0, 1, open_low=True), "Sample among the likeliest tokens that hold this mass.")
    min_p: float = _param(0.0, Float(0, 1), "Drop tokens below this share of the likeliest token's probability.")
    repetition_penalty: float = _param(1.0, Float(0, 1000, open_low=True), "Above 1 discourages tokens already seen.")
    presence_penalty: float = _param(0.0, Float(-100, 100), "Taken from the logit of every token already answered.")
    frequency_penalty: float = _param(0.0, Float(-100, 100), "The same, once for each time it was answered.")
    logit_bias: tuple[tuple[int, float], ...] = _param((), Bias(), "Added to the logits of these token ids.")
    banned_tokens: tuple[int, ...] = _param((), TokenIds(), "Token ids that are never answered.")
    bad_words: tuple[str, ...] = _param((), Strings(), "Words that are never answered; each must be one token.")
    forced_tokens: tuple[int, ...] = _param((), TokenIds(), "Token ids that the answer begins with.")
    seed: int | None = _param(None, Int(0, 2**63 - 1), "Seed of the row's randomness; by default the run's.")
    stop: tuple[str, ...] = _param((), Strings(), "Texts that end the answer; they are cut from it.")
    stop_token_ids: tuple[int, ...] = _param((), TokenIds(64), "Token ids that end the answer, beside the model's own.")
    ignore_eos: bool = _param(False, Flag(), "Go on past the model's end-of-text tokens.")
    json_schema: str | None = _param(
        None, Schema(), "The answer is a JSON document of this schema.", aliases=("guided_json",)
    )
    regex: str | None = _param(
        None, Text("a regular expression"), "The answer matches this, from end to end.", aliases=("guided_regex",)
    )
    grammar: str | None = _param(
        None, Text("a grammar's text"), "The answer follows this grammar (Lark's notation, from the rule start).",
        aliases=("guided_grammar",),
    )  # fmt: skip
    response_format: tuple[str, ...] | None = _param(None, ResponseFormat(), "json_schema as OpenAI spells it.")
    source: str | None = _param(
        None,
        Text("a text"),
        "The text that the answer edits: --drafter aggressive drafts from it, by default from the prompt. It changes "
        "no answer.",
    )
    n: int = _param(1, Int(1, 1024), "Answers for each prompt.")
    logprobs: int | None = _param(
        None, Count(20), "Log-probabilities: true for the answered tokens, a number for that many likeliest as well."
    )
    top_logprobs: int | None = _param(None, Int(0, 20), "The number of likeliest tokens, where logprobs is true.")
    echo: bool = _param(False, Flag(), "Put the prompt before the answer.")

    def __post_init__(self) -> None:
        for parameter in TABLE:
            value = getattr(self, parameter.name)
            if value != parameter.default:
                value = dict(value) if isinstance(parameter.kind, Bias) and isinstance(value, tuple) else value
                object.__setattr__(self, parameter.name, parameter.parse(value))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.top_logprobs is not None:
            if self.logprobs is None:
                raise InputError("top_logprobs: got it without logprobs; accepted: together with logprobs true")
            object.__setattr__(self, "logprobs", max(self.logprobs, self.top_logprobs))
            object.__setattr__(self, "top_logprobs", None)
        if self.response_format is not None:
            if self.response_format:
                if self.json_schema not in (None, *self.response_format):
                    raise InputError("response_format: got it beside another json_schema; accepted: one of the two")
                object.__setattr__(self, "json_schema", self.response_format[0])
            object.__setattr__(self, "response_format", None)
        self._check_constraint()
        if self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens: got {self.min_tokens}; accepted: at most max_tokens ({self.max_tokens})")
        if self.echo and self.logprobs is not None:
            raise InputError("echo: got it with logprobs; accepted: one of the two")

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Which of `json_schema`, `regex` and `grammar` is given, and its text."""
        given = [(name, getattr(self, name)) for name in CONSTRAINTS if getattr(self, name) is not None]
        return given[0] if given else None

    def _check_constraint(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{given[1]}: got it beside {given[0]}; accepted: one of the two")
        if given and self.ignore_eos:
            raise InputError(f"ignore_eos: got it with {given[0]}, which says where the answer ends; accepted: false")

    def from_json(self, values: Mapping[str, Any]) -> "SamplingParams":
        """These parameters with the JSON `values` of one row put over them; null means "as the default".

        Raises InputError naming the field, what it got and what it accepts. Keys must be known (`NAMES`).
        """
        given: dict[str, Any] = {}
        for key, value in values.items():
            parameter = NAMES[key]
            if value is None:
                continue
            parsed = parameter.parse(value, name=key)
            if parameter.name in given and given[parameter.name] != parsed:
                raise InputError(f"{key}: got {show(value)} beside another {parameter.name}; accepted: one of the two")
            given[parameter.name] = parsed
        if "max_tokens" in given and "min_tokens" not in given:
            given["min_tokens"] = min(self.min_tokens, given["max_tokens"])  # a default must not make a row fail
        return dataclasses.replace(self, **given) if given else self

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as JSON values: what a job's fingerprint records."""
        out = {p.name: getattr(self, p.name) for p in TABLE if getattr(self, p.name) != p.default}
        return {name: [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, tuple) else value
                for name, value in out.items()}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One line of the table: a field of `SamplingParams` with its kind, default, help and other names."""

    name: str
    kind: Kind
    default: Any
    help: str
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def accepts(self) -> str:
        return self.kind.accepts

    def parse(self, value: Any, *, name: str | None = None) -> Any:
        """The canonical value; InputError where the kind does not accept it."""
        try:
            return self.kind.parse(value)
        except Unacceptable:
            raise InputError(f"{name or self.name}: got {show(value)}; accepted: {self.kind.accepts}") from None


TABLE: tuple[Parameter, ...] = tuple(
    Parameter(f.name, f.metadata["kind"], f.default, f.metadata["help"], f.metadata["aliases"])
    for f in dataclasses.fields(SamplingParams)
)
NAMES: Mapping[str, Parameter] = {name: p for p in TABLE for name in (p.name, *p.aliases)}


@dataclass(frozen=True)
class Option:
    """A command-line option: `type` is int, float, bool or str; a `multiple` option may be given several times; a
    `file` option names the file that holds its value."""

    name: str
    flag: str
    type: type
    multiple: bool
    default: Any
    help: str
    file: bool = False


def options() -> tuple[Option, ...]:
    """Every parameter as a command-line option, with its range and default in the help text."""
    out = []
    kinds = {Int: int, Count: int, Float: float, Flag: bool, Strings: str, TokenIds: int, Bias: str}
    kinds |= {Text: str, Schema: str}
    for p in TABLE:
        if isinstance(p.kind, ResponseFormat):
            continue  # a row's way to say json_schema
        multiple = isinstance(p.kind, Strings | TokenIds)
        accepts = "a JSON object like '{\"42\": -5}'" if isinstance(p.kind, Bias) else p.accepts
        default = "" if p.default in (None, ()) or isinstance(p.kind, Flag) else f"; default {p.default:g}"
        once = " Give it again for more." if multiple else ""
        accepts = "" if isinstance(p.kind, Flag) else f" ({accepts}{default})"
        file = p.name in ("json_schema", "grammar", "source")
        accepts = " (a file)" if file else accepts
        text = f"{p.help}{once}{accepts}"
        out.append(Option(p.name, p.flag, kinds[type(p.kind)], multiple, p.default, text, file))
    return tuple(out)


def from_options(values: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from command-line values by parameter name; None or an empty list leaves the default."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        if name not in NAMES:
            raise InputError(f"{name}: unknown sampling parameter; accepted: {', '.join(NAMES)}")
        if value is None or value == [] or value == ():
            continue
        if isinstance(NAMES[name].kind, Bias) and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise InputError(f"{name}: got {show(value)}; accepted: {NAMES[name].accepts}, as JSON") from None
        row[name] = value
    return SamplingParams().from_json(row)


def is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON can smuggle in halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def show(value: Any, most: int = 60) -> str:
    """A short ASCII form of a value for an error message, safe for any JSON value (huge, nested, not finite)."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a whole number of about {int(math.log10(2) * value.bit_length())} digits"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if len(value) != 1 else f"[{show(value[0], most)}]"
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    value = value[: most + 1] if isinstance(value, str) else value
    text = ("true" if value else "false") if isinstance(value, bool) else ascii(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
