"""A model with its tokenizer: text in, text out. What `jaxinfer.load` returns (host layer).

It calls the same pure functions that everyone can call, on shapes rounded up to buckets, so that a program is compiled
once for each bucket and never again; it looks every few steps and cuts text at stop strings, and surplus tokens are cut
from text, log-probabilities and usage alike.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import quant
from jaxinfer.batch.params import SamplingParams, from_options
from jaxinfer.batch.requests import BadRow, Limits, Prepared, Request, prepare
from jaxinfer.checkpoint import hub
from jaxinfer.checkpoint.chat import ChatTemplate
from jaxinfer.checkpoint.tokenizer import Tokenizer
from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.draft_model import DraftModel
from jaxinfer.decode.grammar import Grammar, Matcher, Vocabulary
from jaxinfer.decode.loop import Result
from jaxinfer.decode.run import Answer, Completion, Run, bucket
from jaxinfer.decode.types import Drafter, Reason
from jaxinfer.errors import InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.adapters import load_adapter
from jaxinfer.models.heads import Head, LoadedHead, holds_head, load_head
from jaxinfer.models.hf import load_config, load_directory
from jaxinfer.models.step import AutoCache, CachePolicy
from jaxinfer.quant.tree import choose, input_axis

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

LOOK = 64  # steps between two looks where no text can end a row early
LOOK_FOR_STOPS = 8
STREAM_SECONDS = 0.1  # aimed at between two pieces of a stream
# Kind of head to its drafter, imported when a head of that kind is loaded.
DRAFTERS: Mapping[str, str] = {
    "medusa": "jaxinfer.decode.medusa:Medusa",
    "ppd": "jaxinfer.decode.ppd:PPD",
    "eagle": "jaxinfer.decode.eagle:Eagle",
    "chimera": "jaxinfer.decode.chimera:Chimera",
}


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """A tokenizer and a chat template as the host layer uses them (`batch.requests.Codec`)."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    vocab_size: int

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What grammars are matched against."""
        size = max(self.vocab_size, self.tokenizer.vocab_size)
        return Vocabulary(self.tokenizer.backend.to_str(), size, self.eos_ids)

    def matcher(self, kind: str, text: str) -> Matcher:
        """A matcher of `json_schema`, `regex` or `grammar`; InputError where it cannot be honoured."""
        return self.vocabulary.matcher(Grammar(kind, text))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""
        return self.tokenizer.eos_ids

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with the model's begin-of-text token if `special`."""
        return self.tokenizer.encode(text, add_special_tokens=special)

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the model answers."""
        if self.template is None:
            raise InputError("messages: got a conversation; accepted: a prompt, since this model has no chat template")
        return self.tokenizer.encode(self.template.render(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(ids)


@dataclasses.dataclass
class LanguageModel:
    """`step` and `params` for the pure functions; `generate`, `stream` and `chat` for text.

    `draft`: a smaller model, or a head trained on this one, that drafts by default. `directory` is where it was loaded
    from.
    """

    step: Step
    params: Any
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    draft: LanguageModel | LoadedHead | None = None
    directory: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.draft, LoadedHead):
            self.draft.check(self.config, self.params)
        elif self.draft is not None and self.draft.step.vocab_size != self.step.vocab_size:
            raise InputError(
                f"draft: got a model of {self.draft.step.vocab_size} tokens; accepted: one of the target's vocabulary, "
                f"{self.step.vocab_size} tokens"
            )

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.step.config

    @functools.cached_property
    def codec(self) -> TextCodec:
        """Text to ids and back, as a batch job needs it."""
        return TextCodec(self.tokenizer, self.template, self.step.vocab_size)

    @property
    def limits(self) -> Limits:
        """How much one row can ask for."""
        return Limits(self.config.max_length, bias=4096, forced=1024, stop_ids=128, top_logprobs=20, grammars=True)

    def encode(self, texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        """(tokens i32[B, P], lengths i32[B]) for the pure functions; P is a power of two, so that shapes repeat."""
        if isinstance(texts, str) or not texts:
            raise InputError(f"encode: got {str(texts)[:60]!r}; accepted: a list of texts")
        tokens, lengths = self.tokenizer.encode_batch(texts)
        if lengths.min() < 1:
            raise InputError(f"encode: got text {int(lengths.argmin())} without a token; accepted: at least one token")
        width = bucket(tokens.shape[1], 16)
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=self.tokenizer.pad_id)
        return jnp.asarray(tokens), jnp.asarray(lengths)

    def decode(self, result: Result) -> list[str]:
        """The texts of what `decode.generate` returned, without the end token."""
        ended = np.asarray(result.finish_reason) == Reason.EOS
        rows = zip(np.asarray(result.tokens), np.asarray(result.lengths) - ended, strict=True)
        return [self.tokenizer.decode(tokens[:length]) for tokens, length in rows]

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        seed: int = 0,
        drafter: Drafter | None = None,
        draft_params: Any = None,
        batch_size: int = 32,
        **sampling: Any,
    ) -> Any:
        """The Completion of a prompt (text, or a conversation as a list of messages); a list of them for a list.

        `sampling`: any field of `batch.params.SamplingParams` (`max_tokens=64`, `temperature=0.8`, `stop=["\\n"]`,
        `json_schema={...}`).
        With `n` above 1 each prompt has a list of n Completions. `drafter` (with its `draft_params`) makes several
        tokens a forward; by default it is the draft model, where there is one. A row's draws depend on `seed`, its
        place in the list and the number of the sample. Many prompts go in groups of `batch_size` rows; for a large
        number of them a batch job (`jaxinfer.batch`) is faster. Raises InputError before anything runs.
        """
        single = _is_one(prompt)
        params = from_options(sampling)
        rows = self._prepare([prompt] if single else list(prompt), params)
        drafter, draft_params = self._drafter(drafter, draft_params)
        groups = max(1, batch_size // params.n)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        found: dict[int, list[Completion]] = {}
        for first in range(0, len(rows), groups):
            chosen = order[first : first + groups]
            run = Run(
                self.step, self.params, [rows[i] for i in chosen], chosen,
                seed=seed, drafter=drafter, draft_params=draft_params,
            )  # fmt: skip
            answers = [Answer(rows[i], self.codec) for i in chosen for _ in range(params.n)]
            while not run.done:
                run.advance(LOOK_FOR_STOPS if params.stop else LOOK)
                run.read(answers)
            completions = run.completions(answers)
            for at, i in enumerate(chosen):
                found[i] = completions[at * params.n : (at + 1) * params.n]
        out = [found[i] if params.n > 1 else found[i][0] for i in range(len(rows))]
        return out[0] if single else out

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        drafter: Drafter | None = None,
        draft_params: Any = None,
        on_finish: Callable[[Completion], None] | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Pieces of the text that `generate` returns, as they come; `on_finish` is given the Completion at the end."""
        params = from_options(sampling)
        if params.n != 1 or not _is_one(prompt):
            raise InputError("stream: got several answers to give; accepted: one prompt with n 1")
        rows = self._prepare([prompt], params)
        drafter, draft_params = self._drafter(drafter, draft_params)
        return self._stream(rows, seed, drafter, draft_params, on_finish)

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """The answer to a conversation, `[{"role": "user", "content": "..."}]`, with the options of `generate`."""
        if isinstance(messages, str):
            raise InputError(f"chat: got text, {messages[:60]!r}; accepted: a list of messages with role and content")
        return self.generate(messages, **options)

    def _stream(self, rows, seed, drafter, draft_params, on_finish) -> Iterator[str]:
        run = Run(self.step, self.params, rows, [0], seed=seed, drafter=drafter, draft_params=draft_params)
        answer, steps = Answer(rows[0], self.codec), 1
        while not run.done:
            begun = time.monotonic()
            run.advance(steps)
            (piece,) = run.read([answer])
            if piece:
                yield piece
            # The number of steps is data, so it may follow the clock: the tokens do not depend on it.
            steps = max(1, min(32, int(steps * STREAM_SECONDS / max(time.monotonic() - begun, 1e-3))))
        if on_finish is not None:
            on_finish(run.completions([answer])[0])

    def _prepare(self, prompts: Sequence[Any], params: SamplingParams) -> list[Prepared]:
        rows = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                request = Request(i, prompt, None, params)
            elif _is_one(prompt):
                request = Request(i, None, tuple(prompt), params)
            else:
                raise InputError(f"prompt {i}: got {type(prompt).__name__}; accepted: text or a list of messages")
            row = prepare(request, self.codec, self.limits)
            if isinstance(row, BadRow):
                raise InputError(row.error if len(prompts) == 1 else f"prompt {i}: {row.error}")
            rows.append(row)
        return rows

    def _drafter(self, drafter: Drafter | None, draft_params: Any) -> tuple[Drafter, Any]:
        if drafter is None:
            drafter = self.default_drafter()
        return drafter, self.draft_params_for(drafter) if draft_params is None else draft_params

    def default_drafter(self) -> Drafter:
        """The drafter of the draft model or head, with its default settings; plain decoding where there is none."""
        if isinstance(self.draft, LoadedHead):
            return drafter_class(self.draft.head)(head=self.draft.head, target=self.step)
        return Autoregressive() if self.draft is None else DraftModel(self.draft.step)

    def draft_params_for(self, drafter: Drafter) -> Any:
        """What `drafter` takes as `draft_params`: the draft's arrays, where it runs this model's draft."""
        if self.draft is None:
            return None
        if isinstance(self.draft, LoadedHead):
            bind = getattr(drafter, "bind", None)  # of drafters that run a head
            return None if bind is None else bind(self.draft.params, self.params)
        return self.draft.params if hasattr(drafter, "step") else None


def drafter_class(head: Head) -> Any:
    """The drafter of a head: a dataclass with the fields `head` and `target`."""
    module, _, name = DRAFTERS[head.kind].partition(":")
    return getattr(importlib.import_module(module), name)


def _is_one(prompt: Any) -> bool:
    """Whether this is one prompt: a text or a conversation, and not a list of those."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence):
        raise InputError(f"prompt: got {type(prompt).__name__}; accepted: text, a list of messages, or a list of those")
    return bool(prompt) and isinstance(prompt[0], Mapping)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    max_length: int | None = None,
    cache: CachePolicy | None = None,
    weights: Sequence[tuple[str, Any]] = (),
    adapter: str | os.PathLike[str] | None = None,
    shardings: Callable[[Step], Any] | None = None,
    draft: str | os.PathLike[str] | LanguageModel | LoadedHead | None = None,
    download: bool = False,
) -> LanguageModel:
    """A LanguageModel from a packaged model ("tinycode"), a Hugging Face directory, or "owner/name" in the Hub cache.

    `dtype` of weights and cache: "auto" is float32 on a CPU, bfloat16 elsewhere. `max_length`: the longest prompt and
    answer together (default: the config's). `weights`: rules as for `quant.apply`, used on each weight as it is loaded.
    `adapter`: a folder of adapters trained for this model (`jaxinfer train adapter`, or PEFT's LoRA), merged into plain
    weights and kept beside quantized ones.
    `shardings`: where the weights go, given the Step (`lambda step: sharding.shardings(step, mesh, rules)`). `draft`: a
    smaller model of the same vocabulary, or a folder of a head trained on this one, that drafts for it. Raises
    CheckpointError, ConfigError or InputError.
    """
    directory = hub.resolve(model, download=download)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = load_config(directory, max_length=max_length)
    step = Step(config, AutoCache() if cache is None else cache, dtype)
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, special_tokens=tokenizer.special_tokens)
    _, params = load_directory(
        directory, dtype=dtype, max_length=max_length,
        shardings=None if shardings is None else shardings(step), on_leaf=_quantizer(step, weights),
    )  # fmt: skip
    if adapter is not None:
        params = merged(load_adapter(config, params, adapter))
    draft = load_draft(draft, dtype=dtype, max_length=config.max_length, download=download)
    return LanguageModel(step, params, tokenizer, template, draft, directory)


def load_draft(
    draft: str | os.PathLike[str] | LanguageModel | LoadedHead | None,
    *,
    dtype: str,
    max_length: int,
    download: bool = False,
) -> LanguageModel | LoadedHead | None:
    """The draft model or head of a folder or name; what is loaded already comes back as it is."""
    if draft is None or isinstance(draft, LanguageModel | LoadedHead):
        return draft
    found = hub.resolve(draft, download=download)
    return load_head(found, dtype=dtype) if holds_head(found) else load(found, dtype=dtype, max_length=max_length)


def merged(params: Any) -> dict[str, Any]:
    """Params with their adapters merged into plain weights; over quantized ones they stay, since those would grow."""

    def one(_: str, leaf: Any) -> Any:
        plain = quant.is_adapter(leaf) and isinstance(leaf.base, jax.Array)
        return quant.merge({"w": leaf})["w"] if plain else leaf

    return quant.map_leaves(one, params)


def _quantizer(step: Step, rules: Sequence[tuple[str, Any]]) -> Callable[[str, jax.Array], Any] | None:
    """Quantizes each weight as soon as it is placed, so that a model never stands whole in its full size."""
    if not rules:
        return None
    abstract = nn.unbox(step.abstract())
    jax.eval_shape(lambda params: quant.apply(params, rules), abstract)  # wrong rules are told before anything is read
    chosen = choose(abstract, [pattern for pattern, _ in rules])

    def convert(path: str, array: jax.Array) -> Any:
        spec = rules[chosen[path]][1] if path in chosen else None
        if spec is None:
            return array
        leaf = jax.block_until_ready(spec.quantize(array, axis=input_axis(path)))
        array.delete()
        return leaf

    return convert
