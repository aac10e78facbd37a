"""Medusa: the tree of likeliest paths, exact output, the right hidden state after every step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.draft_tree import Growing
from jaxinfer.decode.medusa import Medusa
from jaxinfer.errors import ConfigError
from jaxinfer.models.heads.medusa import MedusaHead
from tests import drafter_checks as checks
from tests import head_checks as heads

HEAD = MedusaHead(heads.SHAPE, heads=3)
PARAMS = heads.random_head(HEAD)
DRAFTER = Medusa(HEAD, heads.STEP, nodes=9, branches=4)


def test_the_tree_holds_the_likeliest_paths():
    laws = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(0), (3, 2, 5)))
    grown, frontier = Growing.of_root(laws[0], 5)
    for law in laws[1:]:
        grown, frontier = grown.level(frontier, law[:, None])
    proposal = grown.best(12, 3, jnp.array([True, True]))
    for row in range(2):
        want = {
            path: sum(float(laws[d, row, t]) for d, t in enumerate(path))
            for n in (1, 2, 3) for path in itertools.product(range(5), repeat=n)
        }  # fmt: skip
        best = set(sorted(want, key=want.__getitem__, reverse=True)[:12])
        paths = {0: ()}
        tokens, parents = np.asarray(proposal.tokens[row]), np.asarray(proposal.parent[row])
        for slot, (token, parent) in enumerate(zip(tokens, parents, strict=True), 1):
            assert parent < slot
            paths[slot] = (*paths[int(parent)], int(token))
        assert set(paths.values()) - {()} == best
    assert np.asarray(proposal.valid).all()


def test_heads_begin_as_the_targets_output():
    own = MedusaHead(heads.SHAPE, heads=2, own_output=True)
    hidden = jax.random.normal(jax.random.key(0), (3, heads.D))
    matrix = heads.PARAMS["embedding"].T
    for head in (HEAD, own):
        for logits in head.logits(head.init(jax.random.key(0), matrix), hidden, heads.STEP, heads.PARAMS):
            np.testing.assert_allclose(logits, hidden @ matrix, rtol=1e-5, atol=1e-5)


class Stale(Medusa):
    """Planted bug: the hidden state of the root, however many drafts were kept."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        return jnp.where((n > 0)[:, None], scored.output.hidden[:, 0], state)


def hidden_error(drafter):
    """The largest difference between the state and a fresh forward's, over rows and steps."""
    run, worst = heads.Stepped(drafter, PARAMS), 0.0
    for state in run.states:
        rows = run.rows(state)
        want = np.asarray(heads.hidden_of(heads.padded(rows)))
        for row, tokens in enumerate(rows):
            if len(tokens) > 1:
                worst = max(worst, np.abs(np.asarray(state.drafter)[row] - want[row, len(tokens) - 2]).max())
    return worst


@pytest.mark.slow
def test_the_hidden_state_is_that_of_the_last_token_kept():
    assert hidden_error(DRAFTER) < 1e-4
    assert hidden_error(Stale(HEAD, heads.STEP, nodes=9, branches=4)) > 1e-2


def test_greedy_output_is_plain_output():
    checks.Greedy(DRAFTER, PARAMS, model=heads.STEP, params=heads.PARAMS).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    head = MedusaHead(heads.LAW_SHAPE, heads=2)
    checks.check_law(Medusa(head, heads.Table(), nodes=6, branches=3), heads.random_head(head))


def test_a_missing_or_a_wrong_head_is_refused():
    with pytest.raises(ConfigError, match="needs a head of kind medusa, got none"):
        DRAFTER.check_head(None)
    with pytest.raises(ConfigError, match="nodes: got 0"):
        Medusa(HEAD, heads.STEP, nodes=0)
    with pytest.raises(ConfigError, match="heads: got 0"):
        MedusaHead(heads.SHAPE, heads=0)
