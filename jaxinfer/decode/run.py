"""One group of rows run to the end by the host: bucketed shapes, a look every few steps, text cut at stop strings.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import quant
from jaxinfer.batch.answers import Sample, TopTokens
from jaxinfer.batch.requests import Codec, Prepared
from jaxinfer.decode import loop
from jaxinfer.decode.aggressive import Source
from jaxinfer.decode.compiler import Program
from jaxinfer.decode.config import Config
from jaxinfer.decode.constrained import Constrained, Spent
from jaxinfer.decode.sampling import Features, Sampling
from jaxinfer.decode.text import CutText
from jaxinfer.decode.types import Drafter, Reason, Step

log = logging.getLogger("jaxinfer")

PROMPT_BUCKET = 32  # the shortest width; longer ones double
ANSWER_BUCKET = 64
LIST_BUCKET = 8
_begin = Program(loop.begin, static_argnames=("step", "config"))
_advance = Program(loop.advance, static_argnames=("step", "config"), donate_argnames=("state",))
_finish = Program(loop.finish, donate_argnames=("state",))
_result = Program(loop.result, static_argnames=("config",))


def bucket(size: int, base: int) -> int:
    """The smallest `base * 2**i` that holds `size`."""
    width = base
    while width < size:
        width *= 2
    return width


@dataclasses.dataclass(frozen=True)
class Counts:
    """What an answer cost: target `forwards` and the tokens they `emitted`, drafts `proposed` and `accepted`.

    Prefill is not counted; tokens after a stop string are.
    """

    forwards: int
    emitted: int
    proposed: int
    accepted: int

    @property
    def tokens_per_forward(self) -> float:
        """1.0 for plain decoding."""
        return self.emitted / max(self.forwards, 1)


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer. `tokens` end with the one that ended it; `text` stops before a stop string or an end token.

    `finish_reason`: "stop", "length", or "error" where the logits were not finite. `logprobs` (one a token) and
    `top_logprobs` (the likeliest `(id, log-probability)`) where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    usage: Mapping[str, int]
    stats: Counts
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopTokens, ...] | None = None

    @property
    def sample(self) -> Sample:
        """The answer as `batch.answers` writes it."""
        return Sample(self.text, self.finish_reason, self.tokens, self.logprobs, self.top_logprobs)


class Answer:
    """The text of one answer as its tokens come."""

    def __init__(self, row: Prepared, codec: Codec):
        self.row, self.codec = row, codec
        self.params = row.request.params
        self.tokens: list[int] = []
        self.reason: str | None = None
        self._cut = CutText(codec.decode, self.params.stop)
        self._pieces: list[str] = []
        if self.params.echo:
            prompt = row.request.prompt
            self._pieces.append(prompt if isinstance(prompt, str) else codec.decode(row.tokens))
        self._given = 0

    @property
    def text(self) -> str:
        """All of it so far, the prompt first where it is echoed."""
        return "".join(self._pieces)

    def take(self, tokens: Sequence[int], reason: Reason) -> str:
        """The text that is certain after `tokens`; a `reason` other than RUNNING says that the row ended with them."""
        if self.reason is not None:
            return ""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if reason == Reason.EOS and i == len(tokens) - 1:
                break  # the end token has no text
            self._pieces.append(self._cut.push(token, may_stop=len(self.tokens) >= self.params.min_tokens))
            if self._cut.stopped:
                break
        if not self._cut.stopped and reason != Reason.RUNNING:
            self._pieces.append(self._cut.end())
            self.reason = reason.word
        if self._cut.stopped:
            self.reason = "stop"
        new, self._given = self._pieces[self._given :], len(self._pieces)
        return "".join(new)


class Run:
    """`rows` of one kind (the same parameters, n samples each), numbered `row_ids` for their draws."""

    def __init__(
        self,
        step: Step,
        params: Any,
        rows: Sequence[Prepared],
        row_ids: Sequence[int],
        *,
        seed: int,
        drafter: Drafter,
        draft_params: Any = None,
    ):
        self.step, self.params, self.draft_params = step, params, draft_params
        self.rows = rows
        batch = bucket(len(rows), 1)
        width = bucket(max(len(row.tokens) for row in rows), PROMPT_BUCKET)
        tokens, lengths = np.zeros((batch, width), np.int32), np.ones(batch, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)], lengths[i] = row.tokens, len(row.tokens)
        sampling = _sampling(rows, batch)
        if any(row.source for row in rows) and getattr(drafter, "takes_source", False):
            sources = [*(row.source for row in rows), *[()] * (batch - len(rows))]
            draft_params = self.draft_params = Source.of(sources, bucket(max(map(len, sources)), PROMPT_BUCKET))
        ask = rows[0].request.params
        self.n = ask.n
        self.config = Config(
            max_tokens=bucket(max(row.limit for row in rows), ANSWER_BUCKET), n=ask.n, logprobs=ask.logprobs,
            drafter=drafter, features=Features.of(sampling),
        )  # fmt: skip
        _announce(_describe(step, params, self.config, batch, width), (step, self.config))
        self.state = _begin(
            step, params, jnp.asarray(tokens), jnp.asarray(lengths), config=self.config, key=_key(seed),
            sampling=sampling, row_ids=jnp.asarray([*row_ids, *[0] * (batch - len(rows))], jnp.int32),
            draft_params=draft_params,
        )  # fmt: skip
        self._constrained = None
        if ask.constraint is not None:
            matchers = [row.matcher.fork() for row in rows for _ in range(ask.n)]
            matchers += [None] * (batch * ask.n - len(matchers))  # rows that only fill the bucket
            self._constrained = Constrained(step, params, matchers, config=self.config, draft_params=draft_params)
        self._seen = np.repeat(lengths, ask.n)
        self.done = False

    @property
    def spent(self) -> Spent | None:
        """What the masks of a constrained run cost the host so far."""
        return None if self._constrained is None else self._constrained.spent

    def advance(self, steps: int) -> None:
        """Up to `steps` model steps."""
        if self._constrained is not None:
            self.state = self._constrained.advance(self.state, steps)
            return
        self.state = _advance(
            self.step, self.params, self.state, config=self.config, steps=steps, draft_params=self.draft_params
        )

    def read(self, answers: Sequence[Answer]) -> list[str]:
        """Hands each answer its new tokens (answers run prompt-major); ends the rows whose text has met a stop string.

        Returns each answer's new text.
        """
        seq = self.state.seq
        buffer, lengths, reasons = jax.device_get((seq.tokens, seq.length, seq.reason))
        pieces, met = [], np.zeros(len(lengths), bool)
        for i, answer in enumerate(answers):
            reason = Reason(int(reasons[i]))
            pieces.append(answer.take(buffer[i, self._seen[i] : lengths[i]].tolist(), reason))
            met[i] = answer.reason is not None and reason == Reason.RUNNING
        self._seen = lengths
        self.done = all(answer.reason is not None for answer in answers)
        if met.any() and not self.done:
            self.state = _finish(self.state, jnp.asarray(met))
        return pieces

    def completions(self, answers: Sequence[Answer]) -> list[Completion]:
        """The finished answers with what they cost."""
        result = jax.device_get(_result(self.state, config=self.config))
        return [self._completion(i, answer, result) for i, answer in enumerate(answers)]

    def _completion(self, i: int, answer: Answer, result: Any) -> Completion:
        count, stats = len(answer.tokens), result.stats
        prompt = len(answer.row.tokens)
        logprobs = top = None
        if result.logprobs is not None:
            logprobs = tuple(float(x) for x in result.logprobs.chosen[i, :count])
            rows = zip(result.logprobs.top_ids[i, :count], result.logprobs.top[i, :count], strict=True)
            top = tuple(tuple(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in rows)
        return Completion(
            text=answer.text,
            tokens=tuple(answer.tokens),
            finish_reason=answer.reason or "length",
            usage={"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count},
            stats=Counts(
                int(stats.forwards[i]), int(stats.emitted[i]),
                int(stats.proposed_by_depth[i].sum()), int(stats.accepted_by_depth[i].sum()),
            ),
            logprobs=logprobs,
            top_logprobs=top if answer.params.logprobs else None,
        )  # fmt: skip


def _sampling(rows: Sequence[Prepared], batch: int) -> Sampling:
    """The rows' parameters; rows that only fill the bucket have a limit of 0 and so are done before they begin."""
    row, ask = rows[0], rows[0].request.params
    limits = np.zeros(batch, np.int32)
    limits[: len(rows)] = [row.limit for row in rows]

    def padded(values: Sequence[Any], fill: float) -> list[Any]:
        return [*values, *[fill] * (bucket(len(values), LIST_BUCKET) - len(values))] if values else []

    sampling = Sampling.make(
        batch,
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        min_p=ask.min_p,
        repetition_penalty=ask.repetition_penalty,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        min_tokens=ask.min_tokens,
        bias_ids=padded([token for token, _ in row.bias], -1),
        bias_values=padded([value for _, value in row.bias], 0.0),
        forced=padded(row.forced, -1),
        eos=padded(row.stop_ids, -1),
    )
    return dataclasses.replace(sampling, max_tokens=jnp.asarray(limits))


def _key(seed: int) -> jax.Array:
    """The key of a 64-bit seed; `jax.random.key` of it where it has 32 bits."""
    words = np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _describe(step: Step, params: Any, config: Config, batch: int, width: int) -> str:
    """One line on what is about to be compiled."""
    model = getattr(step, "config", None)
    name = type(step).__name__ if model is None else f"{model.family}, {model.num_layers} layers of {model.hidden_size}"
    law = "sampling" if config.features is not None and config.features.sample else "greedy"
    drafter = f", drafts of {config.drafter.width} by {type(config.drafter).__name__}" if config.drafter.width else ""
    kinds = {type(leaf).__name__ for _, leaf in quant.leaves(params) if hasattr(leaf, "map_axes")}
    kinds |= {type(spec).__name__ for spec in [getattr(step, "cache", None)] if spec is not None} - {"AutoCache"}
    formats = f", {' and '.join(sorted(kinds))}" if kinds else ""
    count = batch * config.n
    rows = f"{count} row{'s' * (count > 1)}, prompts to {width} and answers to {config.max_tokens} tokens"
    return f"compiling for {rows}, {law}{drafter}{formats} ({name})"


@functools.cache
def _announce(program: str, key: Any) -> None:
    """Says once what is compiled: jax keeps a compiled program as long as the process."""
    log.info(program)
