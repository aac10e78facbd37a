"""Several answers: candidates scored side by side, and the best of n."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Config
from jaxinfer.decode.best_of import best_of
from jaxinfer.decode.candidates import _side_by_side, score_candidates
from jaxinfer.errors import InputError
from tests import drafter_checks as checks
from tests import toy

MODEL, PARAMS, V = checks.MODEL, checks.PARAMS, checks.V
K, SIZE = 3, 4
score = jax.jit(score_candidates, static_argnums=0, static_argnames="prefill_chunk")


def case(seed=0, batch=3, width=9):
    rng = np.random.default_rng(seed)
    tokens, lengths = toy.prompts(seed, batch, width, V)
    candidates = rng.integers(0, V, (batch, K, SIZE)).astype(np.int32)
    candidate_lengths = rng.integers(0, SIZE + 1, (batch, K)).astype(np.int32)
    return tokens, lengths, jnp.asarray(candidates), jnp.asarray(candidate_lengths)


def alone(tokens, lengths, candidates, candidate_lengths):
    """Each pair of context and candidate by itself, without a cache."""
    forward = jax.jit(
        lambda ids: jax.nn.log_softmax(MODEL.head(PARAMS, MODEL(PARAMS, ids, jnp.arange(ids.shape[1])[None])[0].hidden))
    )
    want = np.zeros(candidates.shape)
    for b, k in np.ndindex(*candidates.shape[:2]):
        n, m = int(lengths[b]), int(candidate_lengths[b, k])
        ids = np.zeros(tokens.shape[1] + SIZE, np.int32)  # one shape: causal, so what follows does not matter
        ids[: n + m] = np.concatenate([tokens[b, :n], candidates[b, k, :m]])
        law = forward(jnp.asarray(ids[None]))[0]
        want[b, k, :m] = [law[n - 1 + i, ids[n + i]] for i in range(m)]
    return want


@pytest.mark.parametrize("chunk", [4, 256])
def test_candidates_side_by_side_score_as_alone(chunk):
    arguments = case()
    np.testing.assert_allclose(score(MODEL, PARAMS, *arguments, prefill_chunk=chunk), alone(*arguments), atol=1e-4)


def test_a_candidate_does_not_depend_on_the_others():
    tokens, lengths, candidates, sizes = case()
    first = score(MODEL, PARAMS, tokens, lengths, candidates, sizes)
    others = candidates.at[:, 1:].set((candidates[:, 1:] + 1) % V)
    np.testing.assert_array_equal(score(MODEL, PARAMS, tokens, lengths, others, sizes)[:, 0], first[:, 0])


def test_candidates_that_see_each_other_are_noticed(monkeypatch):
    """Planted: a causal mask over all slots."""
    arguments = case()
    monkeypatch.setattr(
        "jaxinfer.decode.candidates._side_by_side", lambda k, n: jnp.tril(jnp.ones((1, k * n + 1, k * n + 1), bool))
    )
    got = jax.jit(lambda *case: score_candidates(MODEL, PARAMS, *case))(*arguments)
    assert np.abs(np.asarray(got) - alone(*arguments)).max() > 0.05


def test_the_mask_is_block_diagonal_and_causal():
    assert _side_by_side(2, 2)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1],
    ]  # fmt: skip


def test_candidates_of_wrong_shape_are_refused():
    tokens, lengths, candidates, sizes = case()
    with pytest.raises(InputError, match=r"candidates: got int32\[3, 3\], accepts integers \[batch, count, length\]"):
        score_candidates(MODEL, PARAMS, tokens, lengths, candidates[..., 0], sizes)
    with pytest.raises(InputError, match="candidates: got 2 rows, accepts 3"):
        score_candidates(MODEL, PARAMS, tokens, lengths, candidates[:2], sizes[:2])
    with pytest.raises(InputError, match=r"candidate_lengths: got shape \[3\], accepts \[3, 3\]"):
        score_candidates(MODEL, PARAMS, tokens, lengths, candidates, sizes[:, 0])


@pytest.mark.slow
def test_best_of_n_keeps_the_highest_reward_of_each_prompt():
    tokens, lengths = toy.prompts(0, 2, 4, V)
    config = Config(max_tokens=3, n=4, temperature=1.0, eos=())
    result = toy.Run(MODEL, config)(PARAMS, tokens, lengths)
    reward = jnp.array([0.0, 2.0, 2.0, 1.0, jnp.nan, -3.0, -jnp.inf, -4.0])
    best = best_of(result, reward, 4)
    for leaf, whole in zip(jax.tree.leaves(best), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(whole)[[1, 5]])
    one = best_of(result, reward, 1)
    np.testing.assert_array_equal(one.tokens, result.tokens)
    with pytest.raises(InputError, match="n: got 3, accepts a divisor of the 8 rows"):
        best_of(result, reward, 3)
    with pytest.raises(InputError, match=r"reward: got shape \[2\], accepts \[8\]"):
        best_of(result, reward[:2], 4)
