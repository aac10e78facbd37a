"""GAD's drafter of one pass: its drafts against a forward over the whole row, its limit, what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Sampling, TopBeta
from jaxinfer.decode.gad_model import BlockDraft
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

PAD, BLOCK = 2, 3
UNREAD: Any = None  # what the drafter has no use for
EXACT = BlockDraft(checks.MODEL, block=BLOCK, beta=1, tau=0.0, pad=PAD)


@pytest.fixture(scope="module")
def exact():
    """With the target as its own drafter: the first of each block is right, the others see PADs and seldom are."""
    return checks.Greedy(EXACT, checks.PARAMS)


def test_at_its_limit_it_is_greedy(exact):
    exact.check()


@jax.jit
def anew(params, tokens, length, pads_at):
    """The block's drafts i32[BLOCK] by a forward over one whole row and PADs from position `pads_at` on."""
    index = jnp.arange(tokens.shape[0])
    ids = jnp.concatenate([tokens, jnp.full(BLOCK - 1, PAD)])[None]
    positions = jnp.concatenate([jnp.where(index < length, index, -1), pads_at + jnp.arange(BLOCK - 1)])[None]
    hidden = checks.MODEL(params, ids, positions)[0].hidden[0]
    hidden = jnp.concatenate([hidden[length - 1][None], hidden[tokens.shape[0] :]])
    return jnp.argmax(checks.MODEL.head(params, hidden), -1)


def test_drafts_are_those_of_a_forward_without_a_cache(exact):
    """At every step of a ragged batch; a PAD one place late (the planted slip) is seen."""
    arguments = exact.arguments(BLOCK)
    state = exact.run.start(exact.params, exact.tokens, exact.lengths, sampling=Sampling.make(4, eos=[-1]), **arguments)
    propose = jax.jit(lambda own, state: EXACT.propose(
        own, state.drafter, state.seq, state.cache, UNREAD, target_params=None, warp=UNREAD
    )[0].tokens)  # fmt: skip
    late = 0
    while not bool(state.seq.done.all()):
        drafts = np.asarray(propose(exact.own, state))
        for row in np.flatnonzero(~np.asarray(state.seq.done)):
            tokens, length = state.seq.tokens[row], state.seq.length[row]
            np.testing.assert_array_equal(drafts[row], anew(exact.own, tokens, length, length))
            late += (drafts[row] != np.asarray(anew(exact.own, tokens, length, length + 1))).any()
        state = exact.run.advance(exact.params, state, steps=1, **arguments)
    assert late > 0


def test_what_it_cannot_do_is_refused_by_name():
    assert EXACT.verifier == TopBeta(1, 0.0)
    for change, told in (({"block": 0}, "block: got 0"), ({"pad": -1}, "pad: got -1"), ({"tau": -1.0}, r"tau: got -1")):
        with pytest.raises(ConfigError, match=told):
            dataclasses.replace(EXACT, **change)
    far = dataclasses.replace(EXACT, pad=checks.V)
    with pytest.raises(ConfigError, match=f"pad: got {checks.V}, accepts a token id below {checks.V}"):
        far.init({}, None, toy.sequence([1, 2]), UNREAD)
    with pytest.raises(ConfigError, match="BlockDraft needs its weights"):
        jax.eval_shape(lambda: EXACT.init(None, None, toy.sequence([1, 2]), UNREAD))
