"""One input row of a batch job: checked, and turned into a request or into the reason why it cannot be one.

Two forms of rows are read: `{"id", "prompt" or "messages", <sampling parameters>}` and the OpenAI batch form
`{"custom_id", "method", "url", "body"}`. A row never raises: `parse_row` returns a `BadRow` that names the field,
what it got and what is accepted, and the job goes on.

Stability: experimental.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from jaxinfer.batch.params import MAX_TOKEN_ID, NAMES, SamplingParams, is_text, show
from jaxinfer.errors import InputError, JaxinferError

Form = Literal["row", "completion", "chat"]
_URLS: Mapping[str, Form] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of an OpenAI request that say nothing about the answer's text.
_IGNORED = ("metadata", "model", "service_tier", "store", "user")
_LONGEST_ID = 512


@dataclass(frozen=True)
class Request:
    """A row that is well formed. Exactly one of `prompt` (text or token ids) and `messages` is given."""

    id: str | int
    prompt: str | tuple[int, ...] | None
    messages: tuple[Mapping[str, Any], ...] | None
    params: SamplingParams
    form: Form = "row"
    model: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be served: its answer is the error."""

    id: str | int
    error: str
    form: Form = "row"


class Codec(Protocol):
    """What the host layer needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, *, special: bool = True) -> Sequence[int]:
        """Token ids of `text`; `special` adds what the model expects before a text (a begin-of-text token)."""
        ...

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """Token ids of a conversation up to where the model answers; InputError without a chat template."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...

    def matcher(self, kind: str, text: str) -> Any:
        """A matcher of a grammar (`decode.grammar.Matcher`); InputError where it cannot be honoured. Asked for where
        `Limits.grammars`."""
        ...


@dataclass(frozen=True)
class Limits:
    """What an executable has room for: tokens of prompt and answer together, entries of the per-row lists, whether it
    decodes under grammars, and tokens of the source that an answer edits (None: any)."""

    max_length: int
    bias: int
    forced: int
    stop_ids: int
    top_logprobs: int
    grammars: bool = False
    source: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A request as the model takes it: token ids, at most `limit` answer tokens, bias (-inf bans), ids that end it, the
    matcher of its grammar (`decode.grammar.Matcher`) at the answer's start, and the source that it edits."""

    request: Request
    tokens: tuple[int, ...]
    limit: int
    bias: tuple[tuple[int, float], ...]
    forced: tuple[int, ...]
    stop_ids: tuple[int, ...]
    matcher: Any = field(default=None, compare=False)
    source: tuple[int, ...] = ()


def identity(row_id: str | int) -> bytes:
    """The bytes that tell ids apart: 1 and "1" are two ids."""
    return json.dumps(row_id).encode()


def parse_row(data: bytes, *, where: str, defaults: SamplingParams, problem: str | None = None) -> Request | BadRow:
    """The request in one row's JSON. `where` ("file:line") is the id of a row without one that can be read.

    `problem` is what the reader found wrong with the row before this (a line too long).
    """
    row_id: str | int = where
    form: Form = "row"
    try:
        if problem is not None:
            raise InputError(problem)
        row = _object(data)
        openai = "custom_id" in row or "body" in row
        id_key = "custom_id" if openai else "id"
        if openai:
            form = _form(row)
        if row.get(id_key) is not None:
            row_id = _id(id_key, row[id_key], strings_only=openai)
        if openai:
            known = ("custom_id", "method", "url", "body")
            _known(row, known)
            body = row.get("body")
            if not isinstance(body, dict):
                raise InputError(f"body: got {_show(row, 'body')}; accepted: an object")
            return _request(row_id, body, defaults, form, prefix="body.")
        return _request(row_id, {k: v for k, v in row.items() if k != "id"}, defaults, form, prefix="")
    except InputError as error:
        return BadRow(row_id, str(error), form)


def prepare_row(
    data: bytes,
    *,
    where: str,
    defaults: SamplingParams,
    codec: Codec,
    limits: Limits,
    problem: str | None = None,
    repeats: str | None = None,
) -> Prepared | BadRow:
    """`parse_row` and `prepare` in one. `repeats`: the place of an earlier row with the same id."""
    row = parse_row(data, where=where, defaults=defaults, problem=problem)
    if repeats is not None:
        name = "id" if row.form == "row" else "custom_id"
        return BadRow(row.id, f"{name}: got {show(row.id)}, which {repeats} has; accepted: new ids", row.form)
    return row if isinstance(row, BadRow) else prepare(row, codec, limits)


def prepare(request: Request, codec: Codec, limits: Limits) -> Prepared | BadRow:
    """The request's token ids and lists, checked against the model's vocabulary and the executable's room."""
    try:
        return _prepare(request, codec, limits)
    except JaxinferError as error:  # a chat template may fail in its own way
        return BadRow(request.id, str(error), request.form)


def encode_prompt(request: Request, codec: Codec) -> tuple[int, ...]:
    """Token ids of the request's prompt or conversation; InputError where it has none or they are unknown."""
    if request.messages is not None:
        name, tokens = "messages", tuple(codec.encode_messages(request.messages))
    elif isinstance(request.prompt, str):
        name, tokens = "prompt", tuple(codec.encode(request.prompt))
    else:
        name, tokens = "prompt", request.prompt or ()
    _in_vocabulary(name, tokens, codec)
    if not tokens:
        raise InputError(f"{name}: got no tokens; accepted: at least one")
    return tokens


def encode_source(request: Request, codec: Codec) -> tuple[int, ...]:
    """Token ids of the text that the answer edits, with the token that ends it; none where the request has none."""
    if request.params.source is None:
        return ()
    tokens = (*codec.encode(request.params.source, special=False), *codec.eos_ids[:1])
    _in_vocabulary("source", tokens, codec)
    return tokens


def _prepare(request: Request, codec: Codec, limits: Limits) -> Prepared:
    params = request.params
    tokens = encode_prompt(request, codec)
    if len(tokens) >= limits.max_length:
        name = "messages" if request.messages is not None else "prompt"
        raise InputError(
            f"{name}: got {len(tokens)} tokens; accepted: at most {limits.max_length - 1}, "
            f"so that one answer token fits into the job's length of {limits.max_length}"
        )
    banned = (*params.banned_tokens, *_banned(params.bad_words, codec))
    bias = tuple(sorted((dict(params.logit_bias) | dict.fromkeys(banned, float("-inf"))).items()))
    eos = () if params.ignore_eos else codec.eos_ids
    stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
    _in_vocabulary("logit_bias", [token for token, _ in params.logit_bias], codec)
    for name in ("banned_tokens", "forced_tokens", "stop_token_ids"):
        _in_vocabulary(name, getattr(params, name), codec)
    for name, got, room in (
        ("logit_bias, banned_tokens and bad_words", len(bias), limits.bias),
        ("forced_tokens", len(params.forced_tokens), limits.forced),
        ("stop_token_ids with the model's end-of-text tokens", len(stop_ids), limits.stop_ids),
        ("logprobs", params.logprobs or 0, limits.top_logprobs),
    ):
        if got > room:
            raise InputError(f"{name}: got {got} entries; accepted: at most {room} in this job")
    limit = min(params.max_tokens, limits.max_length - len(tokens))
    matcher = None if params.constraint is None else _matcher(params, codec, limits)
    source = encode_source(request, codec)
    if limits.source is not None and len(source) > limits.source:
        raise InputError(f"source: got {len(source)} tokens; accepted: at most {limits.source} in this job")
    return Prepared(request, tokens, limit, bias, params.forced_tokens, stop_ids, matcher, source)


def _matcher(params: SamplingParams, codec: Codec, limits: Limits) -> Any:
    """The row's grammar compiled, so that what cannot be honoured is told before anything runs."""
    kind, text = params.constraint or ("", "")
    if not limits.grammars:
        raise InputError(f"{kind}: got one; accepted: none where rows share an executable without grammars")
    matcher = codec.matcher(kind, text)
    if not matcher.begins(params.forced_tokens):
        raise InputError(f"forced_tokens: got tokens that the {kind} forbids; accepted: a beginning that it allows")
    return matcher


def _banned(words: Sequence[str], codec: Codec) -> list[int]:
    """Ids of each word alone and after a space, where they are one token."""
    out = []
    for word in words:
        forms = [codec.encode(form, special=False) for form in (word, " " + word)]
        ids = [ids[0] for ids in forms if len(ids) == 1]
        if not ids:
            raise InputError(f"bad_words: got {show(word)}, which is {len(forms[0])} tokens; accepted: words of one")
        out += ids
    return out


def _in_vocabulary(name: str, ids: Sequence[int], codec: Codec) -> None:
    if ids and max(ids) >= codec.vocab_size:
        raise InputError(f"{name}: got token id {max(ids)}; accepted: 0 to {codec.vocab_size - 1}")


def _object(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"row: got bytes that are not UTF-8 (at byte {error.start}); accepted: UTF-8") from None
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except InputError:
        raise
    except RecursionError:
        raise InputError("row: got JSON that is nested too deeply; accepted: one JSON object") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"row: got no JSON ({error.msg} at character {error.pos}); accepted: one JSON object"
        ) from None
    except ValueError:  # the interpreter's limit on digits
        raise InputError("row: got a number of too many digits; accepted: one JSON object") from None
    if not isinstance(row, dict):
        raise InputError(f"row: got {show(row)}; accepted: one JSON object")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"row: got the key {show(key)} twice; accepted: each key once")
            seen.add(key)
    return row


def _form(row: Mapping[str, Any]) -> Form:
    """The endpoint that an OpenAI row asks for; by its body where it names none."""
    if "id" in row:
        raise InputError("id: got it beside custom_id or body; accepted: one of the two forms")
    if row.get("method") not in (None, "POST"):
        raise InputError(f"method: got {show(row['method'])}; accepted: POST")
    url = row.get("url")
    if url is None:
        body = row.get("body")
        return "chat" if isinstance(body, dict) and "messages" in body else "completion"
    if not isinstance(url, str) or url not in _URLS:
        raise InputError(f"url: got {show(url)}; accepted: {' or '.join(_URLS)}")
    return _URLS[url]


def _id(name: str, value: Any, *, strings_only: bool) -> str | int:
    accepted = f"a string of 1 to {_LONGEST_ID} characters" + ("" if strings_only else " or a whole number")
    if isinstance(value, str) and 1 <= len(value) <= _LONGEST_ID and is_text(value):
        return value
    if not strings_only and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    raise InputError(f"{name}: got {show(value)}; accepted: {accepted}")


def _known(row: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    for key in row:
        if key not in known:
            raise InputError(f"{prefix}{_name(key)}: unknown key; accepted: {', '.join(known)}")


def _name(key: str) -> str:
    return key if key.isidentifier() and key.isascii() and len(key) <= 60 else show(key)


def _show(row: Mapping[str, Any], key: str) -> str:
    return show(row[key]) if row.get(key) is not None else "nothing"


def _request(row_id: str | int, body: Mapping[str, Any], defaults: SamplingParams, form: Form, prefix: str) -> Request:
    openai = form != "row"
    keys = ("prompt", "messages", *NAMES, *((*_IGNORED, "best_of", "stream") if openai else ()))
    _known(body, keys, prefix)
    try:
        if openai:
            _openai_only(body)
        params = defaults.from_json({key: value for key, value in body.items() if key in NAMES})
        prompt, messages = _prompt(body)
        if form == "completion" and messages is not None:
            raise InputError("messages: got them at /v1/completions; accepted: prompt")
        if form == "chat" and prompt is not None:
            raise InputError("prompt: got it at /v1/chat/completions; accepted: messages")
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None
    model = body.get("model") if openai else None
    return Request(row_id, prompt, messages, params, form, model)


def _openai_only(body: Mapping[str, Any]) -> None:
    if body.get("stream"):
        raise InputError(f"stream: got {show(body['stream'])}; accepted: false")
    model = body.get("model")
    if model is not None and not (isinstance(model, str) and is_text(model)):
        raise InputError(f"model: got {show(model)}; accepted: a string")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise InputError(f"best_of: got {show(body['best_of'])}; accepted: the same as n")


def _prompt(body: Mapping[str, Any]) -> tuple[str | tuple[int, ...] | None, tuple[Mapping[str, Any], ...] | None]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if prompt is None and messages is None:
        raise InputError("prompt: got nothing; accepted: prompt or messages")
    if prompt is not None and messages is not None:
        raise InputError("messages: got them beside prompt; accepted: one of the two")
    if messages is not None:
        return None, _messages(messages)
    accepted = f"a string or a list of token ids (whole numbers from 0 to {MAX_TOKEN_ID})"
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        if not is_text(prompt):
            raise InputError("prompt: got half of a surrogate pair; accepted: Unicode text")
        return prompt, None
    if not isinstance(prompt, list):
        raise InputError(f"prompt: got {show(prompt)}; accepted: {accepted}")
    for token in prompt:
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            raise InputError(f"prompt: got a list with {show(token)}; accepted: {accepted}")
    return tuple(prompt), None


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages: got {show(messages)}; accepted: a list of at least one message")
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def _message(name: str, message: Any) -> Mapping[str, Any]:
    """The message with its content as one string; what else it holds (a name, tool calls) is the template's."""
    if not isinstance(message, dict):
        raise InputError(f"{name}: got {show(message)}; accepted: an object with role and content")
    if message.get("role") not in _ROLES:
        raise InputError(f"{name}.role: got {_show(message, 'role')}; accepted: {', '.join(_ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type", "text") == "text" else None for p in content]
        content = None if None in parts or not all(isinstance(p, str) for p in parts) else "".join(map(str, parts))
    if not isinstance(content, str):
        raise InputError(f"{name}.content: got {_show(message, 'content')}; accepted: a string or a list of text parts")
    if not is_text(json.dumps(message, ensure_ascii=False)):
        raise InputError(f"{name}: got half of a surrogate pair; accepted: Unicode text")
    return {**message, "content": content}
