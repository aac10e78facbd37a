"""The tree verifier and typical acceptance: exact laws, the limit where the approximation is exact, planted bugs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Chain, CopySpec, Proposal, Tree, Typical, keys
from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.draw import draw
from jaxinfer.decode.tree import slots_of
from jaxinfer.decode.walk import along, path_to, walk
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks

V, ROWS = 5, 20_000
COPIES = CopySpec(gamma=1, copies=3)
PARENT = jnp.array([[0, 0, 1, 1, 2, 3]])  # two children of the root, two and one under them, one at depth 3


@dataclasses.dataclass(frozen=True)
class Fixed(DrafterBase):
    """Always the same tree: 0 and 1, under 0: 2 and 3, under 1: 2, under the first 2: 0. `twins`: 0 in place of 1."""

    twins: bool = False
    width: int = 6
    depth: int = 3

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        tokens = jnp.asarray([0, 0 if self.twins else 1, 2, 3, 2, 0])
        tokens = jnp.broadcast_to(tokens, (seq.length.shape[0], 6))
        return Proposal.of_tree(tokens, PARENT, tokens >= 0, depth=3), state


@dataclasses.dataclass(frozen=True)
class DrawsForEachPath(Tree):
    """Planted: the published rule that draws anew for every path and keeps the path with the longest match."""

    def verify(self, law, proposal, key):
        best = None
        for leaf in (4, 5, 6):
            fresh = jax.vmap(lambda k, leaf=leaf: jax.random.fold_in(k, 100 + leaf))(key)
            parent = jnp.concatenate([jnp.zeros_like(proposal.parent[:, :1]), proposal.parent], 1)
            on_path, at = jnp.zeros(parent.shape, bool), jnp.full(parent.shape[:1], leaf)
            for _ in range(4):
                on_path |= jnp.arange(parent.shape[1]) == at[:, None]
                at = jnp.take_along_axis(parent, at[:, None], 1)[:, 0]
            only = dataclasses.replace(proposal, valid=proposal.valid & on_path[:, 1:])
            verdict = super().verify(law, only, fresh)
            best = verdict if best is None else _longer(best, verdict)
        return best


@dataclasses.dataclass(frozen=True)
class NextFromTheRoot(Tree):
    """Planted: the token after the path is drawn from the root's law."""

    def verify(self, law, proposal, key):
        verdict = super().verify(law, proposal, key)
        token = draw(jnp.exp(law[:, 0]), keys.slot(keys.stream(key, 9), 0))
        return dataclasses.replace(verdict, next_token=token)


def _longer(a, b):
    take = a.n_accepted >= b.n_accepted
    return jax.tree.map(lambda x, y: jnp.where(take.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("twins", [False, True])
def test_tree_output_follows_the_targets_law(twins):
    checks.check_law(Fixed(twins))


@pytest.mark.slow
def test_a_chain_under_the_tree_rule_follows_the_law_too():
    z, accepted = checks.law(COPIES, verifier=Tree())
    assert z < 5 and accepted > 0


@pytest.mark.parametrize("bug", [DrawsForEachPath(), NextFromTheRoot()], ids=["a draw a path", "next from the root"])
def test_planted_bugs_are_seen(bug):
    z, _ = checks.law(Fixed(), verifier=bug)
    assert z > 12


def test_a_step_accepts_as_often_as_the_children_are_likely():
    law = jax.nn.log_softmax(jnp.array([0.3, 1.0, -0.5, 0.2, 0.0]))
    tokens = jnp.broadcast_to(jnp.array([3, 1]), (ROWS, 2))
    proposal = Proposal.of_tree(tokens, jnp.zeros((1, 2)), tokens >= 0, depth=1)
    key = keys.row_keys(jax.random.key(0), jnp.arange(ROWS))
    verdict = jax.jit(Tree().verify)(jnp.broadcast_to(law, (ROWS, 3, V)), proposal, key)
    want = float(jnp.exp(law[3]) + jnp.exp(law[1]))
    assert abs(float(verdict.n_accepted.mean()) - want) < 5 * (want * (1 - want) / ROWS) ** 0.5


@pytest.mark.slow
def test_invalid_drafts_and_what_is_under_them_and_probes_are_never_accepted():
    tokens = jnp.zeros((1, 6), jnp.int32)
    valid = jnp.ones((1, 6), bool)
    cut = Proposal.of_tree(tokens, PARENT, valid.at[0, 0].set(False), depth=3)
    np.testing.assert_array_equal(cut.valid, [[False, True, False, False, True, False]])
    probes = Proposal.of_tree(tokens, PARENT, valid, depth=3, probe=valid)
    law = jnp.full((1, 7, V), -jnp.inf).at[..., 0].set(0.0)  # certain of every draft
    key = keys.row_keys(jax.random.key(0), jnp.arange(1))
    for verifier in (Tree(), Typical()):
        whole, none = (verifier.verify(law, p, key) for p in (Proposal.of_tree(tokens, PARENT, valid, depth=3), probes))
        assert int(whole.n_accepted[0]) == 3 and int(none.n_accepted[0]) == 0
        assert verifier.verify(law, cut, key).path.tolist() == [[0, 2, 5, -1]]


@pytest.mark.slow
def test_a_law_that_is_not_finite_on_the_path_is_told():
    law = jnp.zeros((2, 7, V)).at[0, 1].set(jnp.nan)
    law = law.at[:, 0].set(jnp.array([0.0, *[-jnp.inf] * 4]))
    tokens = jnp.zeros((2, 6), jnp.int32)
    proposal = Proposal.of_tree(tokens, PARENT, tokens >= 0, depth=3)
    key = keys.row_keys(jax.random.key(0), jnp.arange(2))
    assert Tree().verify(law, proposal, key).finite.tolist() == [False, True]


def test_typical_keeps_the_longest_likely_path():
    """Against a plain reading of the rule, on random trees."""
    rng = np.random.default_rng(3)
    rows, n, depth = 200, 8, 3
    parent = np.zeros((rows, n), np.int32)
    for j in range(1, n):
        level = slots_of(
            Proposal(jnp.zeros((rows, n), jnp.int32), jnp.asarray(parent), jnp.ones((rows, n), bool), depth=n)
        )
        candidates = np.asarray(level.depth)[:, : j + 1] < depth
        parent[:, j] = [rng.choice(np.flatnonzero(c)) for c in candidates]
    tokens = rng.integers(0, V, (rows, n)).astype(np.int32)
    law = np.asarray(jax.nn.log_softmax(jnp.asarray(2 * rng.normal(size=(rows, n + 1, V)), jnp.float32)))
    proposal = Proposal.of_tree(jnp.asarray(tokens), jnp.asarray(parent), jnp.ones((rows, n), bool), depth=depth)
    rule = Typical(epsilon=0.3, delta=0.6)
    verdict = jax.jit(rule.verify)(jnp.asarray(law), proposal, keys.row_keys(jax.random.key(0), jnp.arange(rows)))
    p = np.exp(law.astype(np.float64))
    threshold = np.minimum(0.3, 0.6 * np.exp((p * law).sum(-1)))
    for b in range(rows):
        paths = [([0], 0.0)]
        for j in range(n):
            over = next((path for path in paths if path[0][-1] == parent[b, j]), None)
            if over and p[b, parent[b, j], tokens[b, j]] > threshold[b, parent[b, j]]:
                paths.append(([*over[0], j + 1], over[1] + law[b, parent[b, j], tokens[b, j]]))
        longest = max(len(path) for path, _ in paths)
        want = max((path for path in paths if len(path[0]) == longest), key=lambda path: path[1])[0]
        got = np.asarray(verdict.path[b])
        assert got[got >= 0].tolist() == want and int(verdict.n_accepted[b]) == len(want) - 1
        assert p[b, want[-1], int(verdict.next_token[b])] > threshold[b, want[-1]]


def test_typical_acceptance_at_temperature_zero_is_greedy():
    checks.Greedy(COPIES, verifier=Typical()).check()


def test_typical_acceptance_is_not_the_targets_law():
    """It is catalogued approximate, and this is why."""
    assert checks.law(Fixed(), verifier=Typical())[0] > 12


def test_walks_and_climbs_agree():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 2, (50, 6)), jnp.int32)
    proposal = Proposal.of_tree(tokens, PARENT, tokens >= 0, depth=3)
    path, n, end = walk(jnp.asarray(rng.integers(0, 2, (50, 7))), proposal)
    np.testing.assert_array_equal(path_to(end, n, proposal), path)
    assert along(path, jnp.zeros((50, 7), bool)).tolist() == (path < 0).tolist()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="epsilon: got 0, accepts more than 0"):
        Typical(epsilon=0)
    with pytest.raises(ConfigError, match="tree"):
        tokens = jnp.zeros((1, 6), jnp.int32)
        Chain().verify(jnp.zeros((1, 7, V)), Proposal.of_tree(tokens, PARENT, tokens >= 0, depth=3), None)
