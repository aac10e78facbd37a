"""PEARL on two devices: the draft model writes the next block on one while the target reads the last on the other.

Liu et al. 2024 (arXiv:2408.11850), as in `pearl`, whose parts these are: the same keys, drafts and verdicts, so the
same tokens as on one device (host layer). In one compiled program nothing would be made to overlap; here each device
has its own programs, and the host only starts them. Neither waits for the other within a step:

    draft's device:   draft gamma tokens after the pending block       | keep what stands
    target's device:  read the pending block | verify, emit, commit ---^

What crosses, each step: the first new draft with its law, then the rows (tokens, lengths, keys) and the verdict, then
the pending block. The host looks once in `look` steps for the end; steps after the last row's end change nothing.

The prompt is read by both models on the target's device, once, before the draft's state moves.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import keys as key_streams
from jaxinfer.decode import loop
from jaxinfer.decode.compiler import Program
from jaxinfer.decode.config import Config
from jaxinfer.decode.draft_chain import Drafts
from jaxinfer.decode.drafter import ChainDrafter
from jaxinfer.decode.pearl import Pearl, PearlState
from jaxinfer.decode.sampling import Sampling, Warp
from jaxinfer.decode.types import Proposal, Step, Verdict
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Told(ChainDrafter):
    """Stands for the drafter where the target is: its drafts come from elsewhere."""

    width: int = 0


def _draft(params, pearl: PearlState, seq, sampling, history, *, drafter: Pearl, config: Config, features):
    """On the draft's device: gamma drafts after the row and its pending block."""
    warp = Warp(sampling, features, seq, history, config.processors)
    return drafter.draft(params, pearl, seq, key_streams.step_keys(seq.key, seq.length), warp)


def _read(params, state: loop.State, tokens, count, *, step: Step, config: Config):
    """On the target's device: the root and the pending block."""
    return loop.score(step, params, state, loop.within_limit(_pending(tokens, count), state.seq), config=config)


def _pending(tokens: jax.Array, count: jax.Array, q_logp: jax.Array | None = None) -> Proposal:
    return Proposal.of_chain(tokens, jnp.arange(tokens.shape[1])[None] < count[:, None], q_logp)


def _judge(state: loop.State, scored, blocks, tokens, count, q_logp, guess, guess_logp, *, config: Config):
    """On the target's device: verify, emit, commit. The state, what the draft must know of it, and who is done."""
    proposal = _pending(tokens, count, None if guess_logp is None else q_logp)
    proposal = dataclasses.replace(proposal, ahead=guess, ahead_logp=guess_logp)
    proposal = loop.within_limit(proposal, state.seq)
    verdict = loop.verify(state, proposal, scored, config=config)
    before = state.seq.length
    state = loop.settle(state, proposal, scored, blocks, verdict, config=config)
    return state, (verdict.n_accepted, verdict.next_token, state.seq.length - before)


def _keep(pearl: PearlState, drafts: Drafts, seq, accepted, token, n, *, drafter: Pearl):
    """On the draft's device: commit what the target kept; the drafts that follow it are pending."""
    told: Any = Verdict(None, accepted, token, None)  # type: ignore[arg-type] - all that Pearl reads of it
    nothing: Any = None
    return drafter.observe(None, dataclasses.replace(pearl, drafts=drafts), seq, nothing, nothing, told, n, nothing)


_begin = Program(loop.begin, static_argnames=("step", "config"))
_draft_program = Program(_draft, static_argnames=("drafter", "config", "features"))
_read_program = Program(_read, static_argnames=("step", "config"))
_judge_program = Program(_judge, static_argnames=("config",), donate_argnames=("state",))
_keep_program = Program(_keep, static_argnames=("drafter",))
_result = Program(loop.result, static_argnames=("config",))


@dataclasses.dataclass(frozen=True)
class PearlDevices:
    """`drafter` on two of `jax.devices()`: the target's forward on `target`, the draft's on `draft`. `look`: steps
    between two looks of the host. Raises ConfigError where the devices are one."""

    drafter: Pearl
    target: Any
    draft: Any
    look: int = 8

    def __post_init__(self):
        if self.target == self.draft:
            raise ConfigError(f"draft: got {self.draft}, which is the target's; accepts another device")
        if self.look < 1:
            raise ConfigError(f"look: got {self.look}, accepts 1 or more")

    def generate(
        self,
        step: Step,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        config: Config,
        key: jax.Array,
        draft_params: Any,
        sampling: Sampling | None = None,
        row_ids: jax.Array | None = None,
    ) -> loop.Result:
        """As `decode.generate`, with `config.drafter` replaced. Weights that are where they belong are not moved."""
        here, there = self.target, self.draft
        params = jax.device_put(params, here)
        config = dataclasses.replace(config, drafter=self.drafter)
        given = jax.device_put((tokens, lengths, key, sampling, row_ids, draft_params), here)
        state = _begin(
            step, params, given[0], given[1], config=config, key=given[2], sampling=given[3], row_ids=given[4],
            draft_params=given[5],
        )  # fmt: skip
        told = dataclasses.replace(config, drafter=_Told(self.drafter.width))
        pearl = jax.device_put(state.drafter, there)
        state = dataclasses.replace(state, drafter=())
        draft_params = jax.device_put(draft_params, there)
        known = jax.device_put((state.seq, state.sampling, state.history), there)
        steps = 0
        while steps % self.look or not np.asarray(state.seq.done).all():
            state, pearl, known = self._step(step, params, draft_params, state, pearl, known, told)
            steps += 1
        return _result(state, config=config)

    def _step(self, step: Step, params, draft_params, state: loop.State, pearl: PearlState, known, config: Config):
        """One step, started on both devices; nothing here waits for either."""
        here, there = self.target, self.draft
        drafter, features = self.drafter, state.features
        drafts = _draft_program(draft_params, pearl, *known, drafter=drafter, config=config, features=features)
        pending = jax.device_put((pearl.tokens, pearl.count, pearl.q_logp), here)
        scored, blocks = _read_program(params, state, pending[0], pending[1], step=step, config=config)
        law = None if drafts.q_logp is None else drafts.q_logp[:, 0]
        guess = jax.device_put((drafts.tokens[:, 0], law), here)
        state, told = _judge_program(state, scored, blocks, *pending, *guess, config=config)
        known = jax.device_put((state.seq, state.sampling, state.history), there)
        pearl = _keep_program(pearl, drafts, known[0], *jax.device_put(told, there), drafter=drafter)
        return state, pearl, known
