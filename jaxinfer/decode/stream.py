"""Streaming: the same step as `generate`, run a few steps at a time by the host, which yields what came.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.decode.compiler import Program
from jaxinfer.decode.config import Config
from jaxinfer.decode.loop import Result, advance, begin, result
from jaxinfer.decode.sampling import Sampling
from jaxinfer.decode.types import Step
from jaxinfer.errors import InputError

_begin = Program(begin, static_argnames=("step", "config"))
_advance = Program(advance, static_argnames=("step", "config"), donate_argnames=("state",))
_result = Program(result, static_argnames=("config",))


class Update(NamedTuple):
    """New tokens of each row (`i32[m]`, m may be 0), `done bool[B]`, and in the last update the whole Result."""

    tokens: list[np.ndarray]
    done: np.ndarray
    result: Result | None


def stream(
    step: Step,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: Config,
    key: jax.Array,
    sampling: Sampling | None = None,
    row_ids: jax.Array | None = None,
    draft_params: Any = None,
    every: int = 4,
) -> Iterator[Update]:
    """Yield an Update after every `every` steps, and one at the end. Together they are what `generate` returns.

    Arguments and errors as for `generate`; a host that wants to stop closes the iterator. The first Update comes after
    one step, so that the time to the first token is the prefill's and one step's.
    """
    if every < 1:
        raise InputError(f"every: got {every}, accepts 1 or more steps")
    state = _begin(
        step, params, tokens, lengths,
        config=config, key=key, sampling=sampling, row_ids=row_ids, draft_params=draft_params,
    )  # fmt: skip
    seen = np.asarray(state.seq.prompt_length)
    steps = 1
    while True:
        state = _advance(step, params, state, config=config, steps=steps, draft_params=draft_params)
        buffer, length, done = (np.asarray(x) for x in (state.seq.tokens, state.seq.length, state.seq.done))
        new = [row[a:b].copy() for row, a, b in zip(buffer, seen, length, strict=True)]
        seen, steps, done = length.copy(), every, done.copy()
        yield Update(new, done, _result(state, config=config) if done.all() else None)
        if done.all():
            return
