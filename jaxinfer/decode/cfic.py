"""CFIC: evidence for a question, found by generating no more of a sentence of the document than tells which it is.

Qian et al. 2024 (arXiv:2402.09760); paper: 3 spans of up to 256 tokens, with a model tuned for it. Constrained sentence
prefix: a beam search over the prefix automaton of the document's sentences, to the token at which one sentence is left,
scored by the mean log-probability. Skip decoding: the sentences after it are not generated but read in one forward, and
the span ends where an end token is likeliest. Overlapping spans are merged. Guarantee: every span is a verbatim part of
the document; which one is approximate (exact for beams as wide as the document has sentences). State: the document's
keys and values, read and never changed; a round scores all beams as one tree.

Departures: the published code branches on the first token alone and passes the number of beams in another argument's
place, so that it is always 3; here every depth branches, as the paper has it. Spans count tokens, where the code counts
words. No weights come with it: what it finds is as good as the model given.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.decode.compiler import Program
from jaxinfer.decode.config import Config
from jaxinfer.decode.types import Proposal, Step
from jaxinfer.errors import ConfigError, InputError

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import LanguageModel

_CONFIG = Config(max_tokens=1)  # nothing is emitted: only the prompt's cache is wanted
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s|$)|\n\s*\n|$)", re.DOTALL)
_begin = Program(loop.begin, static_argnames=("step", "config"))
_score = Program(loop.score, static_argnames=("step", "config"))


@dataclasses.dataclass(frozen=True)
class Span:
    """Sentences `first` to `last`, both of it, and the mean log-probability of the prefix that found them; of merged
    spans the best one's."""

    first: int
    last: int
    score: float


@dataclasses.dataclass(frozen=True)
class Evidence:
    """`text` is `document[start:end]`, letter for letter."""

    text: str
    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True)
class _Beam:
    """A prefix, the sentences that begin with it, and its log-probability; `closed`: one sentence is left."""

    tokens: tuple[int, ...]
    members: tuple[int, ...]
    total: float
    closed: bool = False

    @property
    def score(self) -> float:
        return self.total / max(len(self.tokens), 1)


@dataclasses.dataclass(frozen=True)
class Cfic:
    """`beams`: prefixes kept at each depth, and spans found before merging; `max_tokens`: the longest span."""

    beams: int = 3
    max_tokens: int = 256

    def __post_init__(self):
        for name in ("beams", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 1 or more")

    def retrieve(self, lm: LanguageModel, document: str, question: str, *, form: str = "{}\n\n{}\n") -> list[Evidence]:
        """The spans of `document` that answer `question`, best first. `form` puts the two into a prompt."""
        places = [match.span() for match in _SENTENCE.finditer(document)]
        places = [(a, a + len(document[a:b].rstrip())) for a, b in places]
        if not places:
            raise InputError("document: got no sentence; accepted: at least one")
        sentences = [lm.tokenizer.encode(document[a:b], add_special_tokens=False) for a, b in places]
        tokens, lengths = lm.encode([form.format(document, question)])
        room = lm.config.max_length - max(self.max_tokens, max(map(len, sentences)))
        if int(lengths[0]) > room:
            raise InputError(f"document: got {int(lengths[0])} tokens with its question; accepted: at most {room}")
        spans = self.search(lm.step, lm.params, tokens, lengths, sentences, ends=lm.tokenizer.eos_ids)
        found = [(places[span.first][0], places[span.last][1], span.score) for span in spans]
        return [Evidence(document[a:b], a, b, score) for a, b, score in found]

    def search(
        self,
        step: Step,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        sentences: Sequence[Sequence[int]],
        *,
        ends: Sequence[int],
    ) -> list[Span]:
        """Spans of `sentences` (each its token ids, in the document's order), given the prompt `tokens i32[1, P]`."""
        if not sentences or not all(sentences) or not ends:
            raise InputError("search: got no sentence, an empty one, or no end token; accepted: some of each")
        if tokens.shape[0] != 1:
            raise InputError(f"tokens: got {tokens.shape[0]} prompts, accepts one at a time")
        state = _begin(step, params, tokens, lengths, config=_CONFIG, key=jax.random.key(0))
        spans = []
        for beam in self._prefixes(step, params, state, sentences):
            first = beam.members[0]  # of sentences that are equal, the first
            last = self._skip(step, params, state, sentences, first, ends)
            spans.append(Span(first, last, beam.score))
        return _merged(spans)

    def _prefixes(self, step, params, state, sentences) -> list[_Beam]:
        """The best prefixes, each of one sentence."""
        beams = [_opened((), range(len(sentences)), 0.0, sentences)]
        beams = [beam for opened in beams for beam in opened]
        while not all(beam.closed for beam in beams):
            open_beams = [beam for beam in beams if not beam.closed]
            logp = self._next(step, params, state, [beam.tokens for beam in open_beams])
            grown = [beam for beam in beams if beam.closed]
            for beam, law in zip(open_beams, logp, strict=True):
                depth = len(beam.tokens)
                for token in dict.fromkeys(sentences[i][depth] for i in beam.members):
                    members = [i for i in beam.members if sentences[i][depth] == token]
                    grown += _opened((*beam.tokens, token), members, beam.total + float(law[token]), sentences)
            beams = sorted(grown, key=lambda beam: (-beam.score, beam.members))[: self.beams]
        return beams

    def _next(self, step, params, state, prefixes: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Log-probabilities f64[len(prefixes), V] of the token after each prefix: one forward over all as a tree."""
        depth = 4
        while depth < len(prefixes[0]):
            depth *= 2
        index = np.arange(self.beams * depth, dtype=np.int32).reshape(self.beams, depth)
        parent = np.where(index % depth == 0, 0, index)  # the slot before, and the root for a beam's first token
        tokens, valid = np.zeros(index.shape, np.int32), np.zeros(index.shape, bool)
        for i, prefix in enumerate(prefixes):
            tokens[i, : len(prefix)], valid[i, : len(prefix)] = prefix, True
        proposal = Proposal.of_tree(
            jnp.asarray(tokens.reshape(1, -1)), jnp.asarray(parent.reshape(1, -1)), jnp.asarray(valid.reshape(1, -1)),
            depth=depth,
        )  # fmt: skip
        slots = [i * depth + len(prefix) if prefix else 0 for i, prefix in enumerate(prefixes)]
        return _log_law(step, params, state, proposal)[slots]

    def _skip(self, step, params, state, sentences, first: int, ends: Sequence[int]) -> int:
        """The sentence after which the model would end, among those that fit: one forward over all of them."""
        lengths = np.cumsum([len(sentence) for sentence in sentences[first:]])
        count = max(1, int((lengths <= self.max_tokens).sum()))
        text = np.asarray([i for s in sentences[first : first + count] for i in s], np.int32)
        width = 16
        while width < len(text):
            width *= 2
        drafts = jnp.asarray(np.pad(text, (0, width - len(text)))[None])
        proposal = Proposal.of_chain(drafts, jnp.arange(width)[None] < len(text))
        law = _log_law(step, params, state, proposal)[lengths[:count]]
        return first + int(np.logaddexp.reduce(law[:, list(ends)], axis=1).argmax())


def _opened(tokens: tuple[int, ...], members: Sequence[int], total: float, sentences) -> list[_Beam]:
    """A prefix's beams: one for the sentence that is over with it, and one for those that go on."""
    over = tuple(i for i in members if len(sentences[i]) == len(tokens))
    others = tuple(i for i in members if len(sentences[i]) > len(tokens))
    beams = [_Beam(tokens, over, total, True)] if over else []
    if others:
        alone = not over and len({tuple(sentences[i]) for i in others}) == 1 and len(tokens) > 0
        beams.append(_Beam(tokens, others, total, alone))
    return beams


def _log_law(step: Step, params: Any, state: loop.State, proposal: Proposal) -> np.ndarray:
    """The model's log-law f64[R, V] after the root and after each draft."""
    scored, _ = _score(step, params, state, proposal, config=_CONFIG)
    logits = np.asarray(scored.logits[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Overlapping spans as one, best first."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.first):
        if merged and span.first <= merged[-1].last:
            before = merged.pop()
            span = Span(before.first, max(before.last, span.last), max(before.score, span.score))
        merged.append(span)
    return sorted(merged, key=lambda span: -span.score)
