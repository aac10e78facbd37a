"""Trees, the greedy walk, chain verification and emission on plain arrays: no model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Chain, Greedy, Proposal, Reason, Verdict, keys
from jaxinfer.decode.emit import emit
from jaxinfer.decode.tree import slots_of, visibility
from jaxinfer.decode.types import Sequence
from jaxinfer.errors import ConfigError
from tests import toy

V = 5
chain = jax.jit(Chain().verify)
run_emit = jax.jit(emit)


def random_tree(rng, rows, n, depth):
    """Random parents of depth at most `depth`, tokens, and validity closed under parents."""
    parent = np.zeros((rows, n), np.int32)
    level = np.zeros((rows, n + 1), int)
    valid = np.ones((rows, n + 1), bool)
    for row in range(rows):
        for j in range(n):
            choices = [s for s in range(j + 1) if level[row, s] < depth]
            parent[row, j] = rng.choice(choices)
            level[row, j + 1] = level[row, parent[row, j]] + 1
            valid[row, j + 1] = valid[row, parent[row, j]] and rng.random() < 0.8
    tokens = rng.integers(0, V, (rows, n)).astype(np.int32)
    return Proposal(jnp.asarray(tokens), jnp.asarray(parent), jnp.asarray(valid[:, 1:]), depth=depth), level


def path_to(parent, slot):
    path = []
    while slot:
        path.append(slot)
        slot = int(parent[slot - 1])
    return path[::-1]


def test_slots_and_visibility_of_trees():
    proposal, level = random_tree(np.random.default_rng(0), 20, 7, 4)
    slots = slots_of(proposal)
    np.testing.assert_array_equal(slots.depth, level)
    seen = np.asarray(visibility(slots))
    for row in range(20):
        for slot in range(8):
            want = {0, *path_to(np.asarray(proposal.parent[row]), slot)}
            assert set(np.flatnonzero(seen[row, slot])) == want


def test_a_chain_is_a_tree_with_constant_shape():
    tokens, valid = jnp.ones((2, 3), jnp.int32), jnp.array([[True, False, True], [True, True, True]])
    line = Proposal.of_chain(tokens, valid)
    np.testing.assert_array_equal(line.valid, [[True, False, False], [True] * 3])
    tree = slots_of(Proposal(tokens, line.parent, line.valid, depth=3))
    np.testing.assert_array_equal(jnp.broadcast_to(slots_of(line).depth, (2, 4)), tree.depth)
    np.testing.assert_array_equal(jnp.broadcast_to(slots_of(line).ancestors, (2, 4, 3)), tree.ancestors)


def test_greedy_walks_trees_and_chains():
    """The accepted path is the longest one that follows the argmax; siblings' order changes nothing."""
    rng = np.random.default_rng(1)
    rows = 200
    proposal, _ = random_tree(rng, rows, 8, 4)
    law = rng.normal(size=(rows, 9, V)).astype(np.float32)
    verdict = jax.jit(lambda law, p: Greedy().verify(law, p, None))(jnp.asarray(law), proposal)
    best = law.argmax(-1)
    tokens, parent, valid = (np.asarray(x) for x in (proposal.tokens, proposal.parent, proposal.valid))
    for row in range(rows):
        at, path = 0, [0]
        while hits := [
            j + 1 for j in range(8) if valid[row, j] and parent[row, j] == at and tokens[row, j] == best[row, at]
        ]:
            at = hits[0]
            path.append(at)
        got = np.asarray(verdict.path[row])
        assert list(got[got >= 0]) == path and verdict.n_accepted[row] == len(path) - 1
        assert verdict.next_token[row] == best[row, at]
    line = Proposal.of_chain(proposal.tokens[:, :4], proposal.valid[:, :4])
    as_tree = Proposal(line.tokens, line.parent, line.valid, depth=4)
    one, two = jax.jit(lambda *pair: [Greedy().verify(law[:, :5], p, None) for p in pair])(line, as_tree)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_chain_takes_what_is_certain_and_refuses_what_is_impossible():
    """p = 0 is never accepted nor drawn, whatever q says; NaN drafts fall back to the target's own law."""
    rows = 4000
    p = jnp.log(jnp.array([0.0, 0.5, 0.5, 0.0, 0.0]))
    law = jnp.broadcast_to(p, (rows, 2, V))
    key = keys.row_keys(jax.random.key(0), jnp.arange(rows))
    for q in (jnp.zeros(V).at[0].set(1.0), jnp.full(V, jnp.nan), jnp.zeros(V)):
        proposal = Proposal.of_chain(
            jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool), jnp.broadcast_to(jnp.log(q), (rows, 1, V))
        )
        verdict = chain(law, proposal, key)
        assert int(verdict.n_accepted.sum()) == 0
        assert abs(toy.chi_square(np.asarray(verdict.next_token)[:, None], {(1,): 0.5, (2,): 0.5})[0]) < 4


def test_p_equal_to_q_accepts_all():
    law = jnp.broadcast_to(jax.nn.log_softmax(jnp.arange(5.0)), (4000, 2, V))
    key = keys.row_keys(jax.random.key(0), jnp.arange(4000))
    tokens = jax.random.randint(jax.random.key(1), (4000, 1), 0, V)
    verdict = chain(law, Proposal.of_chain(tokens, tokens >= 0, law[:, :1]), key)
    assert (verdict.n_accepted == 1).all()


def test_the_chain_verifier_refuses_trees():
    proposal, _ = random_tree(np.random.default_rng(0), 2, 3, 2)
    with pytest.raises(ConfigError, match="tree"):
        Chain().verify(jnp.zeros((2, 4, V)), proposal, None)


def sequence(length, limit, *, done=None):
    rows = len(length)
    as_array = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    done = jnp.zeros(rows, bool) if done is None else jnp.asarray(done)
    tokens = jnp.full((rows, 12), 9, jnp.int32)
    reason = jnp.where(done, jnp.int32(Reason.STOP), 0)
    return Sequence(tokens, as_array(length), as_array(length), as_array(limit), done, reason, as_array(length))


PROPOSAL = Proposal.of_chain(jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool))
VERDICT = Verdict(jnp.array([[0, 1, 2, 3]]), jnp.array([3]), jnp.array([4]), jnp.array([True]))


@pytest.mark.parametrize("end", range(-1, 5))
@pytest.mark.parametrize("room", range(1, 6))
def test_emission_stops_at_the_first_end_token_and_at_the_limit(end, room):
    """Three accepted drafts 1 2 3 and a bonus 4: an end token at each offset against a limit at each offset."""
    seq, emission = run_emit(sequence([2], [2 + room]), PROPOSAL, VERDICT, jnp.array([[-1, end]]))
    want = [1, 2, 3, 4][:room]
    ended = end in want
    want = want[: want.index(end) + 1] if ended else want
    n = len(want)
    assert int(emission.n[0]) == n
    assert list(np.asarray(seq.tokens[0])) == [9, 9, *want, *[9] * (10 - n)]
    reason = Reason.EOS if ended else Reason.LENGTH if n == room else Reason.RUNNING
    assert int(seq.reason[0]) == reason and bool(seq.done[0]) == (reason != 0)


def test_rows_that_are_done_and_rows_that_are_not_finite_emit_nothing():
    tokens = jnp.ones((3, 2), jnp.int32)
    verdict = Verdict(jnp.zeros((3, 3), jnp.int32), jnp.full(3, 2), jnp.full(3, 1), jnp.array([True, False, False]))
    seq, emission = run_emit(
        sequence([3, 3, 3], [9, 9, 9], done=[True, False, True]),
        Proposal.of_chain(tokens, tokens > 0), verdict, jnp.zeros((3, 0), jnp.int32),
    )  # fmt: skip
    np.testing.assert_array_equal(emission.n, [0, 0, 0])
    np.testing.assert_array_equal(seq.reason, [Reason.STOP, Reason.ERROR, Reason.STOP])
    np.testing.assert_array_equal(seq.tokens, 9)
    assert seq.done.all()


def test_a_full_buffer_drops_what_does_not_fit():
    """Nothing wraps and nothing clamps: the last slots keep what they hold."""
    seq, _ = run_emit(sequence([10], [99]), PROPOSAL, VERDICT, jnp.array([[-1, -1]]))
    assert list(np.asarray(seq.tokens[0])) == [9] * 10 + [1, 2]
