"""Grammars: an answer that is a JSON document of a schema, matches a regular expression, or follows a context-free one.

A matcher of each row tells after every token which tokens may come next, and the rest get no probability. Willard,
Louf 2023 (arXiv:2307.09702) have the masks, Dong et al. 2024 (XGrammar, arXiv:2411.15100) the masks of drafts by
stepping and rolling back; the matching itself is the llguidance library's (the extra `grammar`): an Earley parser over
regular expressions by derivatives, walked along the vocabulary's trie. Guarantee: every answer that ends by itself is
in the language, and the law is that of the masked target, one token at a time, drafts or none: greedy output token for
token. That law is not the target's conditioned on the language (Park et al. 2024, arXiv:2405.21047). State: a matcher a
row, on the host (`decode.constrained`).

A JSON Schema whose keywords the library does not honour is refused, never taken for a wider one. Narrower than the
standard: properties come in the schema's order, integers have no decimal point, where exactly one text can follow it is
written in the tokenizer's own tokens, and between the parts of a document stands a space, a line break, or neither.
Wider than its letter: `format` is held by its shape (no leap days, leap seconds or punycode), and a property that only
`additionalProperties` admits may come twice.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import ConfigError, InputError

log = logging.getLogger("jaxinfer")

_KINDS = ("json_schema", "regex", "grammar")
# Between the parts of a document: a space, or one line break and what indents the next line. Without a bound a model in
# doubt writes blank lines until its tokens are spent. A schema's own "x-guidance" may say otherwise.
_WHITESPACE = {"whitespace_pattern": r" |\n[ \t]{0,40}"}
# A schema may carry the library's own options; these two would make it ignore keywords.
_STRICT = {"lenient": False, "coerce_one_of": False}
_KEPT = 256  # compiled grammars kept for a vocabulary


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer may be: `kind` is json_schema, regex or grammar, and `text` a schema as JSON, an expression that
    matches the whole answer, or a grammar in Lark's notation (`start: "yes" | "no"`)."""

    kind: str
    text: str

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ConfigError(f"kind: got {self.kind!r}, accepts {', '.join(_KINDS)}")
        if not isinstance(self.text, str) or not self.text:
            raise ConfigError(f"text: got {self.text!r}, accepts the text of a {self.kind}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """The documents of a schema, given decoded or as JSON text. The order of its properties is kept."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """The texts that `pattern` matches whole (Rust's syntax: no look-around, no back-references)."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """The texts of a grammar in Lark's notation, from its rule `start`."""
        return cls("grammar", text)


class Vocabulary:
    """A tokenizer as matchers see it: `tokenizer_json` is the text of its `tokenizer.json`, `size` the model's
    vocabulary, `ends` the ids that end a text. Keeps what it compiled."""

    def __init__(self, tokenizer_json: str, size: int, ends: Sequence[int]):
        library = _library()
        if not ends:
            raise InputError("grammar: got a model without an end token; accepted: one that can end an answer itself")
        try:
            # Rows of embeddings beyond the tokenizer's last token are tokens without text: they are never allowed.
            self._tokens = library.LLTokenizer(tokenizer_json, n_vocab=size, eos_token=list(ends))
        except ValueError as error:
            raise InputError(f"grammar: this model's tokenizer cannot be matched: {_first_line(error)}") from None
        self.words = -(-size // 32)
        self.ends = tuple(ends)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer. Raises InputError, in the library's words, for what it cannot honour."""
        return Matcher(self._compiled(grammar).deep_copy(), self.words, self.ends)

    def _compile(self, grammar: Grammar) -> Any:
        library = _library().LLMatcher
        failed, messages = True, [""]
        try:
            text = self._text(grammar, library)
            failed, messages = library.validate_grammar_with_warnings(text, self._tokens)
            if not failed:
                return library(self._tokens, text, log_level=0)
        except ValueError as error:
            messages = [str(error)]
        accepts = "a schema that can be held token by token" if grammar.kind == "json_schema" else "one that compiles"
        raise InputError(f"{grammar.kind}: got {_shown(grammar.text)}: {_first_line(messages[0])}; accepted: {accepts}")

    def _text(self, grammar: Grammar, library: Any) -> str:
        if grammar.kind == "regex":
            return library.grammar_from_regex(grammar.text)
        if grammar.kind == "grammar":
            return library.grammar_from_lark(grammar.text)
        try:
            schema = json.loads(grammar.text)
        except ValueError as error:
            raise ValueError(f"no JSON ({error})") from None
        if isinstance(schema, bool):
            if not schema:
                raise ValueError("false allows no document")
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError("a schema is an object, true or false")
        return library.grammar_from_json_schema(json.dumps(schema), _WHITESPACE, _STRICT)


class Matcher:
    """Where one answer stands in its grammar. `error` is None, or why the library gave the answer up (a limit met)."""

    def __init__(self, matcher: Any, words: int, ends: tuple[int, ...]):
        self._matcher, self._words, self._ends = matcher, words, ends
        self.error: str | None = None

    @property
    def complete(self) -> bool:
        """The answer may end here."""
        return self._matcher.is_accepting()

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the answer's next tokens; an end token among them, and what follows it, is no part of the text."""
        for token in tokens:
            if token in self._ends:
                return
            if self.error is None and not self._matcher.consume_token(token):
                self._note()

    def forced(self, limit: int) -> list[int]:
        """Up to `limit` tokens that must come next, each the only one that the grammar allows; an end token too."""
        if limit < 1 or self.error is not None:
            return []
        tokens = self._matcher.compute_ff_tokens()[:limit]
        if len(tokens) < limit and len(self._ends) == 1:
            taken = self._matcher.try_consume_tokens(tokens) if tokens else 0
            if taken == len(tokens) and self._matcher.is_stopped() and self._matcher.is_accepting():
                tokens = [*tokens, self._ends[0]]
            if taken:
                self._matcher.rollback(taken)
        return tokens

    def fill(self, words: np.ndarray, tokens: Sequence[int], parent: Sequence[int], valid: Sequence[bool]) -> int:
        """Write what may follow the answer, and what may follow each draft, to `words u32[R, W]`, a bit a token.

        `tokens`, `parent` (0 is the answer so far), `valid` of R - 1 drafts. The words of a draft that the grammar
        forbids or that ends the answer stay as they are: nothing after it is ever kept. Returns how many were written.
        """
        children: list[list[int]] = [[] for _ in words]
        for index, (above, counts) in enumerate(zip(parent, valid, strict=True)):
            if counts:
                children[above].append(index + 1)
        return self._walk(words, tokens, children, 0)

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` from here on are a whole answer, each allowed by the mask before it; moves nothing."""
        words, walker = np.zeros(self._words, np.uint32), self.fork()
        for token in tokens:
            walker._mask(words)
            if not _bit(words, token):
                return False
            walker.advance([token])
        walker._mask(words)
        return any(_bit(words, end) for end in self._ends)

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether the grammar allows `tokens` next, one after the other; moves nothing."""
        return self._matcher.validate_tokens(list(tokens)) == len(tokens)

    def fork(self) -> Matcher:
        """Another matcher at the same place."""
        return Matcher(self._matcher.deep_copy(), self._words, self._ends)

    def _walk(self, words: np.ndarray, tokens: Sequence[int], children: list[list[int]], slot: int) -> int:
        self._mask(words[slot])
        written = 1
        for child in children[slot]:
            token = int(tokens[child - 1])
            if token in self._ends or not _bit(words[slot], token):
                continue
            if self._matcher.try_consume_tokens([token]) == 1:
                written += self._walk(words, tokens, children, child)
                self._matcher.rollback(1)
        return written

    def _mask(self, words: np.ndarray) -> None:
        if self.error is None:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._matcher.is_error():
                self._note()
        if self.error is not None:
            words[:] = 0  # no token has any probability: the row ends with an error

    def _note(self) -> None:
        self.error = _first_line(self._matcher.get_error() or "the grammar does not allow the token")
        log.warning("an answer was given up by its grammar: %s", self.error)


def _bit(words: np.ndarray, token: int) -> bool:
    return token >> 5 < len(words) and bool(int(words[token >> 5]) >> (token & 31) & 1)


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise InputError(
            "json_schema, regex and grammar need the llguidance library: pip install 'jaxinfer[grammar]'"
        ) from None


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 60 else ascii(text[:57]) + "..."


def _first_line(message: object) -> str:
    """The library's message on one line, without the state that it dumps after it."""
    text = str(message).partition("\n<state>")[0]
    return " ".join(text.split())[:300]
