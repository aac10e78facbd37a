"""Particle-based Monte Carlo: answers drawn from the model's law tilted by a reward, by resampling partial answers.

Puri et al. 2025 (arXiv:2502.01618). The target is p(x) exp(beta reward(x)) over whole answers x. N particles a prompt
write a segment at a time; after each one they are weighted by how much their reward rose, and resampled. A reward r in
(0, 1) of a process reward model enters as its logit, `log(r / (1 - r))`. Paper: N 4 (1 to 128 studied), a segment ends
at a blank line, at most 40 of them, temperature 0.8, resampling after every segment.

`particle_filter` is one pass. `particle_gibbs` repeats it with one particle held to the last pass's choice, which makes
a Markov chain whose stationary law is the target's (Andrieu, Doucet, Holenstein 2010). With several `betas` it runs a
chain at each of them, which may exchange their answers after every pass (parallel tempering).

Guarantee: approximate; the target's law as N grows, and the model's own where the reward is constant or N is 1.

Departures: the published code weighs by the whole reward at every segment, not by its rise, which counts early rewards
again at each later one and has no fixed target: `published=True` does that. It also ignores its temperature after the
first segment; here it is a setting like any other.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.decode import keys as key_streams
from jaxinfer.decode import loop
from jaxinfer.decode.config import Config, end_tokens
from jaxinfer.decode.draw import pick
from jaxinfer.decode.types import Reason, Sequence, Step
from jaxinfer.errors import ConfigError

Reward = Callable[[Sequence], jax.Array]  # f32[rows]: the log-potential of each row's text as it stands
ROWS, RESAMPLE, REFERENCE, SWAP = range(4)  # what draws are for: the first thing that a key of a call folds in


@dataclasses.dataclass(frozen=True)
class ParticleConfig:
    """Static part. `particles`: N. A segment ends with one of the tokens `ends`, or after `segment` tokens. `ess`: the
    share of N under which the effective sample size must fall before a group is resampled (1: always). `scheme`:
    systematic, or multinomial. `passes`: of `particle_gibbs`. `betas`: a chain each; the first one's answers count."""

    config: Config
    particles: int = 4
    segment: int = 64
    ends: tuple[int, ...] = ()
    ess: float = 1.0
    scheme: str = "systematic"
    passes: int = 1
    betas: tuple[float, ...] = (1.0,)
    published: bool = False

    def __post_init__(self):
        for name in ("particles", "segment", "passes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, accepts an integer of 1 or more")
        if not 0 <= self.ess <= 1:
            raise ConfigError(f"ess: got {self.ess}, accepts 0 to 1")
        if self.scheme not in ("systematic", "multinomial"):
            raise ConfigError(f"scheme: got {self.scheme!r}, accepts 'systematic', 'multinomial'")
        if not self.betas or min(self.betas) < 0:
            raise ConfigError(f"betas: got {self.betas}, accepts at least one, each 0 or more")
        own = self.config
        if own.temperature <= 0:
            raise ConfigError(f"config.temperature: got {own.temperature}, accepts more than 0: particles are sampled")
        unused = {"n": 1, "forced": (), "min_tokens": 0, "logprobs": None}
        for name, accepts in unused.items():
            if getattr(own, name) != accepts:
                raise ConfigError(f"config.{name}: got {getattr(own, name)!r}, accepts {accepts!r} for particles")


@struct.dataclass
class ParticleResult:
    """N particles of each prompt's first chain: `tokens i32[B, N, max_tokens]` (0 after `lengths i32[B, N]`),
    `rewards f32[B, N]` as the callable gave them, `weights f32[B, N]` that sum to 1, `chosen i32[B]`: a draw by weight,
    `best i32[B]`: the highest reward, `log_evidence f32[B]`: an estimate of log E_p[exp(beta reward)], 0 if published,
    and the forwards of every row, `forwards i32[B, N]`, of the last pass."""

    tokens: jax.Array
    lengths: jax.Array
    rewards: jax.Array
    weights: jax.Array
    chosen: jax.Array
    best: jax.Array
    log_evidence: jax.Array
    forwards: jax.Array


@struct.dataclass
class _Pass:
    """One pass over G groups of N rows. `reward f32[G, N]` after the last segment, `logw f32[G, N]` since the last
    resampling, `evidence f32[G]`."""

    state: loop.State
    reward: jax.Array
    logw: jax.Array
    evidence: jax.Array
    round: jax.Array


def particle_filter(
    step: Step, params: Any, tokens: jax.Array, lengths: jax.Array, *, config: ParticleConfig, key: jax.Array,
    reward: Reward, draft_params: Any = None,
) -> ParticleResult:  # fmt: skip
    """One pass over `tokens i32[B, P]` (right-padded, `lengths i32[B]`), whatever `config.passes` says.

    `reward(seq) -> f32[rows]` sees the rows as they stand at the end of a segment. Pure, under the caller's jit with
    `step`, `config` and `reward` static.
    """
    return particle_gibbs(
        step, params, tokens, lengths, config=dataclasses.replace(config, passes=1), key=key, reward=reward,
        draft_params=draft_params,
    )  # fmt: skip


def particle_gibbs(
    step: Step, params: Any, tokens: jax.Array, lengths: jax.Array, *, config: ParticleConfig, key: jax.Array,
    reward: Reward, draft_params: Any = None,
) -> ParticleResult:  # fmt: skip
    """`config.passes` passes, each but the first with a particle held to the answer chosen before. Arguments as for
    `particle_filter`."""
    run = _Run(step, params, tokens, lengths, config, key, reward, draft_params)
    found = run.sweep(jnp.int32(0), None)
    if config.passes > 1:

        def again(i: jax.Array, carry: tuple[_Pass, jax.Array]) -> tuple[_Pass, jax.Array]:
            done, _ = carry
            reference = run.references(done, i - 1)
            return run.sweep(i, reference), reference

        start = (found, run.references(found, jnp.int32(0)))
        found, _ = jax.lax.fori_loop(1, config.passes, again, start)
    return run.result(found)


class _Run:
    """What the passes of one call share: the prompts, repeated for chains and particles, and the keys."""

    def __init__(self, step, params, tokens, lengths, config: ParticleConfig, key, reward: Reward, draft_params):
        self.step, self.params, self.config, self.reward, self.draft_params = step, params, config, reward, draft_params
        self.batch, self.width = tokens.shape
        self.chains, self.n = len(config.betas), config.particles
        self.groups = self.batch * self.chains
        self.key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        own = config.config
        self.eos = end_tokens(step) if own.eos is None else own.eos
        self.features = dataclasses.replace(own.features_for(own=True), forced=config.passes > 1)
        self.sampling = own.sampling(self.batch, self.eos)
        self.prompts = (tokens, lengths)
        self.beta = jnp.tile(jnp.asarray(config.betas, jnp.float32), self.batch)  # prompt-major: [B, chains]

    def fold(self, *numbers: jax.Array | int) -> jax.Array:
        """A key of this call for `numbers`."""
        key = self.key
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    def sweep(self, index: jax.Array, reference: jax.Array | None) -> _Pass:
        """One pass; `reference i32[G, max_tokens]`: the answer that each group's first particle is held to (-1 past its
        end). A row's draws come from the pass, the segment and its place, never from a key that another row had."""
        state = self.begin(reference)
        whole = state.seq.limit
        zeros = jnp.zeros((self.groups, self.n))  # a prompt's own reward is the same for all: 0 will do
        first = _Pass(state, zeros, zeros, jnp.zeros(self.groups), jnp.int32(0))

        def live(carry: _Pass) -> jax.Array:
            return ~carry.state.seq.done.all()

        def body(carry: _Pass) -> _Pass:
            return self.segment(index, carry, whole, reference is not None)

        last = jax.lax.while_loop(live, body, first)
        return dataclasses.replace(last, evidence=last.evidence + self.gain(last.logw))

    def begin(self, reference: jax.Array | None) -> loop.State:
        """Prefill each prompt once and lay its rows: prompt-major, then chain, then particle."""
        tokens, lengths = self.prompts
        own, keys = self.config.config, key_streams.row_keys(self.fold(ROWS), jnp.arange(self.batch))
        state = loop.start(
            self.step, self.params, tokens, lengths, self.sampling, keys,
            config=own, capacity=self.width + own.max_tokens, draft_params=self.draft_params, features=self.features,
        )  # fmt: skip
        state = loop.select(state, jnp.repeat(jnp.arange(self.batch), self.chains * self.n))
        forced = jnp.full((self.groups, self.n, own.max_tokens), -1, jnp.int32)
        if reference is not None:
            forced = forced.at[:, 0].set(reference)
        forced = forced.reshape(self.groups * self.n, -1)
        return dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, forced=forced))

    def segment(self, index: jax.Array, carry: _Pass, whole: jax.Array, held: bool) -> _Pass:
        """Every row writes a segment; then the groups are weighed and resampled."""
        rows = jnp.arange(self.groups * self.n)
        going = ~carry.state.seq.done.reshape(self.groups, self.n).all(1)  # a group that is done stays as it is
        state = self.write(carry.state, whole, self.fold(ROWS, index, carry.round), rows)
        reward = self.of(state.seq)
        rise = reward if self.config.published else reward - carry.reward
        rise = jnp.where(reward == -jnp.inf, -jnp.inf, rise)
        logw = carry.logw + jnp.where(going[:, None], self.beta[:, None] * rise, 0.0)
        share = _shares(logw)
        more = ~state.seq.done.reshape(self.groups, self.n).all(1)
        again = (1 / (share**2).sum(1) <= self.config.ess * self.n * (1 + 1e-6)) & more
        parents = self.ancestors(share, self.fold(RESAMPLE, index, carry.round), held)
        parents = jnp.where(again[:, None], parents, jnp.arange(self.n))
        state = loop.reorder(state, (jnp.arange(self.groups)[:, None] * self.n + parents).reshape(-1))
        if held:  # only the held row follows its forced tokens; a copy of it goes free
            own = jnp.where((rows % self.n == 0)[:, None], state.sampling.forced, -1)
            state = dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, forced=own))
        evidence = carry.evidence + jnp.where(again, self.gain(logw), 0.0)
        logw = jnp.where(again[:, None], 0.0, logw)
        return _Pass(state, jnp.take_along_axis(reward, parents, 1), logw, evidence, carry.round + 1)

    def gain(self, logw: jax.Array) -> jax.Array:
        """log of the mean weight of each group, f32[G]."""
        return jax.nn.logsumexp(logw, 1) - jnp.log(self.n)

    def write(self, state: loop.State, whole: jax.Array, key: jax.Array, rows: jax.Array) -> loop.State:
        """Run the loop until every row has ended its segment. A segment's end looks to the loop like the row's own: a
        limit, or an end token; rows that did not really end go on afterwards."""
        seq, sampling = state.seq, state.sampling
        running = ~seq.done
        limit = jnp.minimum(whole, seq.length + self.config.segment)
        ends = jnp.asarray((*self.eos, *self.config.ends), jnp.int32)
        ends = jnp.broadcast_to(ends, (rows.shape[0], ends.shape[0]))
        state = dataclasses.replace(
            state,
            seq=dataclasses.replace(seq, limit=limit, key=key_streams.row_keys(key, rows)),
            sampling=dataclasses.replace(sampling, eos=ends),
        )
        config, most = self.config.config, self.config.segment
        state = loop.advance(
            self.step, self.params, state, config=config, steps=most + 1, draft_params=self.draft_params
        )
        seq = state.seq
        last = (seq.root[:, None] == jnp.asarray(self.eos, jnp.int32)).any(1) if self.eos else jnp.zeros_like(running)
        over = (seq.reason == Reason.ERROR) | last | (seq.length >= whole)
        reason = jnp.where(last, jnp.int32(Reason.EOS), jnp.int32(Reason.LENGTH))
        reason = jnp.where(seq.reason == Reason.ERROR, seq.reason, jnp.where(over, reason, 0))
        reason = jnp.where(running, reason, seq.reason)
        return dataclasses.replace(
            state,
            seq=dataclasses.replace(seq, limit=whole, done=reason != 0, reason=reason),
            sampling=sampling,
        )

    def of(self, seq: Sequence) -> jax.Array:
        """The rewards f32[G, N]; what is not a number counts as impossible."""
        found = self.reward(seq).astype(jnp.float32)
        return jnp.where(jnp.isnan(found), -jnp.inf, found).reshape(self.groups, self.n)

    def ancestors(self, share: jax.Array, key: jax.Array, held: bool) -> jax.Array:
        """Whose copy each particle becomes, i32[G, N]; a held first particle stays itself."""
        keys = jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(self.groups))
        if self.config.scheme == "multinomial" or held:  # systematic draws are not valid beside a held particle
            u = key_streams.uniforms(keys, self.n)
        else:
            u = (key_streams.uniforms(keys)[:, None] + jnp.arange(self.n)) / self.n
        parents = jax.vmap(lambda p, v: jax.vmap(lambda x: pick(p, x))(v))(share, u)
        return parents.at[:, 0].set(0) if held else parents

    def references(self, found: _Pass, index: jax.Array) -> jax.Array:
        """Each group's answer drawn by weight, i32[G, max_tokens] with -1 past its end, exchanged between chains."""
        chosen = self.draw(found, index)
        rows = jnp.arange(self.groups) * self.n + chosen
        seq = found.state.seq
        room = self.config.config.max_tokens
        at = seq.prompt_length[rows, None] + jnp.arange(room)
        tokens = jnp.take_along_axis(seq.tokens[rows], at, 1, mode="clip")
        answers = jnp.where(at < seq.length[rows, None], tokens, -1)
        if self.chains == 1:
            return answers
        reward = jnp.take_along_axis(found.reward, chosen[:, None], 1)[:, 0]
        return answers[self.exchange(reward, index)]

    def exchange(self, reward: jax.Array, index: jax.Array) -> jax.Array:
        """Which group's answer each group goes on with: neighbouring chains swap by the Metropolis rule, in turns."""
        group = jnp.arange(self.groups)
        chain = group % self.chains
        lower = (chain + index) % 2 == 0
        other = jnp.where(lower, group + 1, group - 1)
        real = jnp.where(lower, chain + 1 < self.chains, chain > 0)
        other = jnp.where(real, other, group)
        gain = (self.beta - self.beta[other]) * (reward[other] - reward)
        pair = jnp.minimum(group, other)  # both of a pair read one uniform
        u = key_streams.uniforms(jax.vmap(lambda g: jax.random.fold_in(self.fold(SWAP, index), g))(pair))
        return jnp.where(real & (jnp.log(u) < gain), other, group)

    def draw(self, found: _Pass, index: jax.Array) -> jax.Array:
        """A particle of each group by weight, i32[G]."""
        keys = jax.vmap(lambda g: jax.random.fold_in(self.fold(REFERENCE, index), g))(jnp.arange(self.groups))
        return pick(_shares(found.logw), key_streams.uniforms(keys))

    def result(self, found: _Pass) -> ParticleResult:
        """The first chain of each prompt."""
        rows = loop.result(found.state, self.config.config)
        first = jnp.arange(self.batch) * self.chains

        def grouped(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(self.groups, self.n, *leaf.shape[1:])[first]

        reward = found.reward[first]
        evidence = jnp.zeros(self.batch) if self.config.published else found.evidence[first]
        chosen = self.draw(found, jnp.int32(self.config.passes - 1))[first]
        return ParticleResult(
            grouped(rows.tokens), grouped(rows.lengths), reward, _shares(found.logw[first]), chosen,
            reward.argmax(1), evidence, grouped(rows.stats.forwards),
        )  # fmt: skip


def _shares(logw: jax.Array) -> jax.Array:
    """Weights f32[G, N] that sum to 1; equal ones where nothing is possible."""
    peak = logw.max(1, keepdims=True)
    weights = jnp.where(peak == -jnp.inf, 1.0, jnp.exp(logw - jnp.where(peak == -jnp.inf, 0.0, peak)))
    return weights / weights.sum(1, keepdims=True)
