"""What bench_decoding runs of jaxinfer: a subject (model, draft), a method on it, and what a step of it costs.

A method is written as `jaxinfer generate --drafter` spells it. Batch 1 decodes the prompts one after the other, a
larger batch all at once; every prompt is padded to one width, so a method compiles once a batch size and temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import cache as kv
from jaxinfer import decode, measure
from jaxinfer.cli.options import DRAFTERS
from jaxinfer.decode import Config, Stats, keys
from jaxinfer.decode.sampling import Features, Warp

OPTIONS = decode.compiler_options()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A target and its draft model, as pure functions and weights."""

    name: str
    step: Any
    params: Any
    draft_step: Any
    draft_params: Any

    def drafter(self, method: str) -> Any:
        """The drafter that the command line would make of `method`."""
        return DRAFTERS.parse(method, step=self.draft_step)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the benchmark: which prompts, how many at a time, how warm."""

    prompts: tuple[tuple[int, ...], ...]
    width: int
    batch: int
    tokens: int
    temperature: float

    def groups(self) -> list[tuple[jax.Array, jax.Array]]:
        """`(tokens i32[batch, width], lengths i32[batch])` of each group of prompts."""
        padded = np.zeros((len(self.prompts), self.width), np.int32)
        for row, prompt in zip(padded, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        starts = range(0, len(self.prompts), self.batch)
        return [(jnp.asarray(padded[i : i + self.batch]), jnp.asarray(lengths[i : i + self.batch])) for i in starts]


def runner(subject: Subject, method: str, setting: Setting) -> Callable[[], list[decode.Result]]:
    """A callable that decodes every group of `setting` with `method` and returns the Results."""
    config = config_of(subject, method, setting)
    generate = jax.jit(decode.generate, static_argnames=("step", "config"), compiler_options=OPTIONS)
    groups, key = setting.groups(), jax.random.key(0)

    def run() -> list[decode.Result]:
        return [
            generate(
                subject.step, subject.params, tokens, lengths,
                config=config, key=jax.random.fold_in(key, i), draft_params=subject.draft_params,
            )
            for i, (tokens, lengths) in enumerate(groups)
        ]  # fmt: skip

    return run


def config_of(subject: Subject, method: str, setting: Setting) -> Config:
    """End tokens are ignored, so that every method makes the same number of tokens."""
    return Config(max_tokens=setting.tokens, temperature=setting.temperature, eos=(), drafter=subject.drafter(method))


def statistics(results: Sequence[decode.Result], plain: Sequence[decode.Result]) -> dict[str, Any]:
    """Tokens a forward, forwards per 100 tokens, acceptance by depth, and how many answers equal the plain ones."""
    parts: list[Stats] = [result.stats for result in results]
    stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    emitted, forwards = int(stats.emitted.sum()), int(stats.forwards.sum())
    pairs = zip(np.concatenate([r.tokens for r in results]), np.concatenate([r.tokens for r in plain]), strict=True)
    return {
        "tokens": emitted,
        "tokens_per_forward": emitted / max(forwards, 1),
        "forwards_per_100": 100 * forwards / max(emitted, 1),
        "acceptance_by_depth": [round(float(x), 4) for x in stats.acceptance_by_depth],
        "accepted_per_forward": float(stats.accepted_by_depth.sum()) / max(forwards, 1),
        "equal": sum(bool((a == b).all()) for a, b in pairs),
    }


def costs(subject: Subject, method: str, setting: Setting, *, rounds: int) -> dict[str, float]:
    """Seconds of a forward over one token, of the method's forward over all its slots, and of its proposal."""
    config = config_of(subject, method, setting)
    tokens, lengths = setting.groups()[0]
    begin = jax.jit(decode.begin, static_argnames=("step", "config"), compiler_options=OPTIONS)
    key = jax.random.key(0)
    state = begin(
        subject.step, subject.params, tokens, lengths, config=config, key=key, draft_params=subject.draft_params
    )
    slots = config.drafter.width + 1

    def forward(n: int) -> Callable[[], Any]:
        def run(params, cache, seq):
            positions = seq.length[:, None] - 1 + jnp.arange(n)
            ids = jnp.broadcast_to(seq.root[:, None], positions.shape)
            output, _ = subject.step(params, ids, positions, cache, kv.new_blocks(cache, n), 0)
            return subject.step.head(params, output.hidden)

        compiled = jax.jit(run, compiler_options=OPTIONS)
        return lambda: compiled(subject.params, state.cache, state.seq)

    def propose(draft_params, params, state):
        features: Features = state.features
        warp = Warp(state.sampling, features, state.seq, state.history, ())
        step_key = keys.step_keys(state.seq.key, state.seq.length)
        return config.drafter.propose(
            draft_params, state.drafter, state.seq, state.cache, step_key, target_params=params, warp=warp
        )[0]

    proposal = jax.jit(propose, compiler_options=OPTIONS)
    timings = measure.interleaved(
        {
            "one": forward(1),
            "slots": forward(slots),
            "proposal": lambda: proposal(subject.draft_params, subject.params, state),
        },
        rounds=rounds,
        min_seconds=0.02,
    )
    return {name: timing.median for name, timing in timings.items()}


def predicted(tokens_per_forward: float, cost: dict[str, float]) -> dict[str, float]:
    """The draft's cost as a share of a target forward, and the speed-up that the parts' times promise."""
    step = cost["slots"] + cost["proposal"]
    return {
        "draft_cost": cost["proposal"] / cost["one"],
        "score_cost": cost["slots"] / cost["one"],
        "predicted": tokens_per_forward * cost["one"] / step,
    }
