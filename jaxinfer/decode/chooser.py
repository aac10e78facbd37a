"""Tree choice: how many drafts a step may score, chosen for each row from what was accepted and what a forward costs.

The rule of Leviathan et al. 2022 (arXiv:2211.17192), expected tokens over expected time, with acceptance measured for
each draft as PPD (arXiv:2405.18628) does for its trees, and the machine's own latency curve. Guarantee: the wrapped
drafter's (each length is a legal draft). State: the drafter's, and for each draft of a row how often it was reached
(its parent stood) and how often it stood, both forgotten at a rate.

A draft's chance is its own share given its parent, drawn towards the row's mean while little is known; chances multiply
along a path, and their sum over the first m drafts, and one, is what a step of m drafts is expected to emit. The row
takes the size with the most tokens a second, or none where no size gains at least `gain` over none. A row without
drafts tries its best size again after a wait. Drafts must come in an order in which each prefix is worth
scoring: chains do, and trees whose nodes come best first.

Times are static: `LatencyCurve`s measured once (`Chooser.measured`) and kept in the Config, so that a job that goes on
chooses as before. A row's choice depends on its own past alone, and so does its output's law. The target's forward
runs at the smallest size that holds every row's drafts (`widths`), so a batch in which no row drafts costs a plain
step; that is the one thing in which rows touch, and it changes their numbers by rounding alone.

Where no row will draft (each is off, or its drafter has nothing to propose), the loop runs plain steps, and asks the
drafter for nothing (`idle`): then a step costs what it costs without a chooser. A row tries again when its wait is over
and there is something to try; the wait is `probe` steps, and longer where a try costs more than `BUDGET` of that wait.
A row with fewer than `probe` tokens to go tries no more.

But a row that drafts then costs its neighbours the wider forward. `together` takes one size for the batch, from the
mean of its rows' expectations: the most tokens a second for the batch, and sampled rows whose draws depend on their
neighbours (their law does not, nor greedy output), so that a job must go on with the same batches to be the same.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import measure
from jaxinfer.decode.draft_model import DraftModel
from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.draw import first_max
from jaxinfer.decode.types import Proposal, Step, Verdict, Verifier
from jaxinfer.errors import ConfigError
from jaxinfer.measure import LatencyCurve

PRIOR, WEIGHT = 0.7, 2.0  # what is believed of a draft before anything was seen, and how many sights that is worth
ROUNDS, SECONDS, TURNS = 9, 0.02, 16  # of a measurement; what one lasts at least, or the forwards in it at most
BUDGET = 0.02  # of plain steps' time: what tries may cost
FORGET, FORGET_PROBE = 0.9, 0.5  # what is left of the counts after a step with drafts, and before a probe


@struct.dataclass
class ChooserState:
    """`inner`: the drafter's state. `reached`, `stood f32[B, N]`: counts of each draft; `parent i32[B, N]`: the last
    proposal's; `best i32[B]`: the size with the most tokens a second; `off bool[B]`: it does not pay; `wait`,
    `waited i32[B]`: steps from one try of an off row to the next, and since the last; `alive bool[B]`: rows that had a
    say in that; `size i32[B]`: drafts of this step at most."""

    inner: Any
    reached: jax.Array
    stood: jax.Array
    parent: jax.Array
    best: jax.Array
    off: jax.Array
    wait: jax.Array
    waited: jax.Array
    alive: jax.Array
    size: jax.Array

    @classmethod
    def empty(cls, inner: Any, batch: int, drafts: int) -> ChooserState:
        """Nothing seen, nothing chosen."""
        none, zeros = jnp.zeros((batch, drafts), jnp.float32), jnp.zeros(batch, jnp.int32)
        parent = jnp.broadcast_to(jnp.arange(drafts, dtype=jnp.int32), (batch, drafts))
        no = zeros.astype(bool)
        return cls(inner, none, none, parent, zeros, no, zeros, zeros, no, zeros)


@dataclasses.dataclass(frozen=True)
class Chooser(DrafterBase):
    """`drafter`: whose drafts are chosen from. `target`: seconds of a target forward by scored slots; `draft`: seconds
    of drafting by drafts (None: nothing). `sizes`: draft counts to choose among, each compiled (empty: powers of two,
    and the drafter's width). `gain`: the least predicted speed-up for which a row drafts; `together`, `probe`: see
    above."""

    drafter: Any
    target: LatencyCurve
    draft: LatencyCurve | None = None
    sizes: tuple[int, ...] = ()
    gain: float = 1.1
    together: bool = False
    probe: int = 64

    def __post_init__(self):
        n = self.drafter.width
        if n < 1:
            raise ConfigError(f"drafter: got {type(self.drafter).__name__}, which drafts nothing to choose from")
        powers = tuple(1 << i for i in range(n.bit_length()) if 1 << i < n)
        sizes = tuple(sorted(self.sizes or (*powers, n)))
        if sizes[0] < 1 or sizes[-1] > n or len(set(sizes)) < len(sizes):
            raise ConfigError(f"sizes: got {self.sizes}, accepts different counts of 1 to {n} drafts")
        if self.probe < 64:
            raise ConfigError(f"probe: got {self.probe}, accepts 64 steps or more")
        if self.gain < 1:
            raise ConfigError(f"gain: got {self.gain}, accepts 1 or more")
        object.__setattr__(self, "sizes", sizes)
        if type(self.drafter) is DraftModel:  # no draft forward for a row that does not draft
            object.__setattr__(self, "drafter", dataclasses.replace(self.drafter, lazy=True))

    @classmethod
    def measured(
        cls,
        drafter: Any,
        step: Step,
        params: Any,
        *,
        batch: int,
        capacity: int,
        draft_params: Any = None,
        **options: Any,
    ) -> Chooser:
        """With curves measured now on this machine (host): forwards of each size over `batch` rows of `capacity`
        tokens, and of the draft model's where the drafter has one. `options`: as for the class."""
        sizes = cls(drafter, LatencyCurve((1,), (1.0,)), **options).sizes
        model = getattr(drafter, "step", None)
        forwards = {("target", n): _forwards(step, params, batch, capacity, n) for n in (1, *(m + 1 for m in sizes))}
        if model is not None:
            forwards |= {("draft", n): _forwards(model, draft_params, batch, capacity, n) for n in (1, 2)}
        single = measure.interleaved({"one": functools.partial(forwards["target", 1], 1)}, rounds=1)["one"].median
        turns = max(1, min(TURNS, round(SECONDS / single)))
        # Interleaved, so that a change of the machine's pace bends no ratio.
        calls = {f"{who} {n}": functools.partial(call, turns) for (who, n), call in forwards.items()}
        timings = measure.interleaved(calls, rounds=ROUNDS)
        seconds = {key: timings[f"{key[0]} {key[1]}"].median / turns for key in forwards}
        slots = tuple(n for who, n in seconds if who == "target")
        target = LatencyCurve(slots, tuple(seconds["target", n] for n in slots))
        if model is None:
            return cls(drafter, target, **options)
        one, two = seconds["draft", 1], seconds["draft", 2]
        return cls(drafter, target, LatencyCurve((1, 2), (two, two + one)), **options)  # first its last two tokens

    @property
    def step(self) -> Step:
        """The drafter's model, where it has one."""
        return self.drafter.step

    @property
    def head(self) -> Any:
        """The drafter's head, where it has one."""
        return self.drafter.head

    @property
    def bind(self) -> Any:
        """How the drafter's head takes its target, where it has one."""
        return self.drafter.bind

    @property
    def vocab_size(self) -> int:
        """The drafter's vocabulary, where it has one."""
        return self.drafter.vocab_size

    @property
    def width(self) -> int:
        """N: the largest size."""
        return self.sizes[-1]

    @property
    def depth(self) -> int:
        """D."""
        return min(self.drafter.depth, self.width)

    @property
    def taps(self) -> tuple[int, ...]:
        """The drafter's."""
        return self.drafter.taps

    @property
    def widths(self) -> tuple[int, ...]:
        """None, and every size."""
        return (0, *self.sizes)

    @property
    def takes_source(self) -> bool:
        """The drafter's."""
        return self.drafter.takes_source

    @property
    def verifier(self) -> Verifier | None:
        """The drafter's."""
        return self.drafter.verifier

    def init(self, params, target_params, seq, cache) -> ChooserState:
        """Nothing seen."""
        inner = self.drafter.init(params, target_params, seq, cache)
        return ChooserState.empty(inner, seq.tokens.shape[0], self.width)

    def prefill(self, params, state: ChooserState, chunk, output) -> ChooserState:
        """The drafter's."""
        return dataclasses.replace(state, inner=self.drafter.prefill(params, state.inner, chunk, output))

    def ready(self, params, state: ChooserState, seq, cache, *, target_params) -> ChooserState:
        """The drafter's, and the first choice."""
        inner = self.drafter.ready(params, state.inner, seq, cache, target_params=target_params)
        return self.choose(dataclasses.replace(state, inner=inner), ~seq.done)

    def idle(self, params, state: ChooserState, seq) -> jax.Array | None:
        """Rows that are off and wait, or whose drafter has nothing."""
        nothing = self.drafter.idle(params, state.inner, seq)
        if nothing is None:
            return None
        waits = state.off & (~self._over(state, ~seq.done) | self._late(seq))
        if self.together:  # a row has ended: the others' mean is another
            waits &= ~(state.alive & seq.done).any()
        return waits | nothing

    def propose(self, params, state: ChooserState, seq, cache, key, *, target_params, warp):
        """The drafter's first drafts, as many as pay."""
        live = ~seq.done
        state = self.choose(state, live) if self.together else self._sized(state, live)
        state = dataclasses.replace(state, size=jnp.where(state.off & self._late(seq), 0, state.size))
        inner = self.drafter.shortened(state.inner, state.size)
        proposal, inner = self.drafter.propose(params, inner, seq, cache, key, target_params=target_params, warp=warp)
        proposal = proposal.leading(self.width)
        few = jnp.arange(self.width)[None] < state.size[:, None]
        return dataclasses.replace(proposal, valid=proposal.valid & few), dataclasses.replace(state, inner=inner)

    def observe(self, params, state: ChooserState, seq, proposal, scored, verdict, n, cache) -> ChooserState:
        """Count what was reached and what stood, and choose anew; the drafter learns too."""
        inner = self.drafter.observe(params, state.inner, seq, proposal, scored, verdict, n, cache)
        state = dataclasses.replace(state, inner=inner)
        if proposal.tokens.shape[1] == 0:  # a plain step: it teaches nothing
            return dataclasses.replace(state, waited=jnp.where(state.off, state.waited + 1, 0))
        return self.choose(self.count(state, proposal, verdict), ~seq.done)

    def choose(self, state: ChooserState, live: jax.Array) -> ChooserState:
        """The state with the next step's size; `live bool[B]`: rows that count where one size is for all."""
        expected = 1 + jnp.cumsum(self.chances(state), 1)
        costs = [self.cost(m) for m in (0, *self.sizes)]
        tokens = jnp.stack([jnp.ones_like(expected[:, 0]), *(expected[:, m - 1] for m in self.sizes)], 1)
        if self.together:
            mean = (tokens * live[:, None]).sum(0) / jnp.maximum(live.sum(), 1)
            tokens = jnp.broadcast_to(mean, tokens.shape)
        rate = tokens / jnp.asarray(costs, jnp.float32) * costs[0]  # 1 without drafts
        best = jnp.argmax(rate[:, 1:], 1)
        off = jnp.take_along_axis(rate[:, 1:], best[:, None], 1)[:, 0] < self.gain
        wait = jnp.asarray([self.wait(m) for m in self.sizes], jnp.int32)[best]
        best = jnp.asarray(self.sizes, jnp.int32)[best]
        return self._sized(dataclasses.replace(state, best=best, off=off, wait=wait, alive=live), live)

    def _sized(self, state: ChooserState, live: jax.Array) -> ChooserState:
        """The state with the size that its choice and its wait come to."""
        return dataclasses.replace(state, size=jnp.where(state.off & ~self._over(state, live), 0, state.best))

    def _over(self, state: ChooserState, live: jax.Array) -> jax.Array:
        """Rows bool[B] that have waited long enough to try again in the next step."""
        waited = state.waited
        if self.together:
            waited = jnp.broadcast_to(jnp.where(live, waited, jnp.iinfo(jnp.int32).max).min(), waited.shape)
        return waited >= state.wait - 1

    def _late(self, seq) -> jax.Array:
        """Rows bool[B] that are too near to their limit for a try to pay back."""
        left = jnp.where(seq.done, 0, seq.limit - seq.length)
        return (jnp.broadcast_to(left.max(), left.shape) if self.together else left) < self.probe

    def wait(self, m: int) -> int:
        """Steps from one try of `m` drafts to the next."""
        return max(self.probe, math.ceil((self.cost(m) / self.cost(0) - 1) / BUDGET))

    def cost(self, m: int) -> float:
        """Seconds of a step of `m` drafts."""
        return self.target(m + 1) + (self.draft(m) if self.draft is not None and m else 0.0)

    def chances(self, state: ChooserState) -> jax.Array:
        """The chance f32[B, N] of each draft to stand."""
        parent = state.parent
        same = parent[:, :, None] == parent[:, None, :]
        rank = (same & jnp.tril(jnp.ones(same.shape[1:], bool), -1)).sum(2)
        firsts = jnp.where(rank == 0, state.reached, 0).sum(1)
        mean = ((state.stood.sum(1) + WEIGHT * PRIOR) / (firsts + WEIGHT))[:, None]
        mean = jnp.clip(mean, 0.0, 1.0)
        given = (state.stood + WEIGHT * mean * (1 - mean) ** rank) / (state.reached + WEIGHT)
        # Along a path to the root, each turn twice as far: the root is its own parent, and its chance is 1.
        chance = jnp.concatenate([jnp.ones_like(given[:, :1]), given], 1)
        above = jnp.concatenate([jnp.zeros_like(parent[:, :1]), parent], 1)
        for _ in range((self.depth - 1).bit_length()):
            chance *= jnp.take_along_axis(chance, above, 1)
            above = jnp.take_along_axis(above, above, 1)
        return chance[:, 1:]

    def count(self, state: ChooserState, proposal: Proposal, verdict: Verdict) -> ChooserState:
        """The state with one step's outcome."""
        index = jnp.arange(self.width + 1, dtype=jnp.int32)
        on_path = (verdict.path[:, :, None] == index).any(1)
        usable = proposal.valid if proposal.probe is None else proposal.valid & ~proposal.probe
        reached = usable & jnp.take_along_axis(on_path, proposal.parent, 1)
        drafted = usable.any(1)
        left = jnp.where(drafted, jnp.where(state.off, FORGET * FORGET_PROBE, FORGET), 1.0)[:, None]
        return dataclasses.replace(
            state,
            reached=left * state.reached + reached,
            stood=left * state.stood + (reached & on_path[:, 1:]),
            parent=jnp.broadcast_to(proposal.parent, state.parent.shape),
            waited=jnp.where(state.off & ~drafted, state.waited + 1, 0),
        )


def _forwards(step: Step, params: Any, batch: int, capacity: int, size: int) -> Callable[[int], Any]:
    """Runs so many forwards of `size` slots and their logits' maximum, over a cache of `batch` rows of `capacity`
    tokens, each fed the last one's tokens: what a loop of steps does, without a call's overhead in each."""

    @jax.jit
    def run(params, cache, tokens, turns):
        positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), tokens.shape)

        def turn(_, tokens):
            output, _ = step(params, tokens, positions, cache, None)
            return first_max(step.head(params, output.hidden))[1]

        return jax.lax.fori_loop(0, turns, turn, tokens)

    cache = jax.jit(lambda: step.new_cache(batch, capacity))()
    return functools.partial(run, params, cache, jnp.zeros((batch, size), jnp.int32))
