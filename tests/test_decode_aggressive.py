"""Aggressive decoding: where drafting resumes in a source, and a head's drafts near the top of the target's scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import GAD, Aggressive, Config, Greedy, TopBeta
from jaxinfer.decode.aggressive import Source, unique_match
from jaxinfer.decode.types import Proposal, Verdict
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

V = 5


def source(*rows, size=12):
    seq = toy.sequence(*rows, size=size)
    return Source(seq.tokens, seq.length)


def plain_match(text, output, longest):
    for count in range(1, longest + 1):
        ends = [i + 1 for i in range(len(text)) if i + 1 >= count and text[i + 1 - count : i + 1] == output[-count:]]
        if len(ends) == 1 and len(output) >= count:
            return ends[0]
    return -1


def test_the_unique_suffix_against_a_plain_search():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 4, rng.integers(1, 13)).tolist() for _ in range(300)]
    outputs = [rng.integers(0, 4, rng.integers(0, 7)).tolist() for _ in texts]
    seq = toy.sequence(*[[1, 2, *row] for row in outputs], prompt=2)
    for longest in (1, 3):
        found = np.asarray(jax.jit(unique_match, static_argnums=2)(source(*texts), seq, longest))
        want = [plain_match(text, row, longest) for text, row in zip(texts, outputs, strict=True)]
        assert found.tolist() == want and len(set(want)) > 5


def test_only_the_output_is_matched_never_the_prompt():
    seq = toy.sequence([1, 2, 3], [1, 2, 3], prompt=2)
    assert unique_match(source([3, 7], [7, 3, 8, 3]), seq, 3).tolist() == [1, -1]


def edit(row, at, token):
    return [*row[:at], token, *row[at + 1 :]]


@functools.cache
def edits(drafts=6):
    """The harness of one drafter with the prompt as its source, whose program also takes a Source a row."""
    return checks.Greedy(Aggressive(drafts))


def with_source(change, drafts=6):
    """The result where each row's source is its plain output after `change`."""
    greedy = edits(drafts)
    greedy.own = source(*[change(row) for row in greedy.plain], size=32)
    return greedy.result(drafts)


@pytest.mark.slow
def test_a_source_that_is_the_answer_takes_the_fewest_forwards():
    result = with_source(lambda row: row)
    assert toy.outputs(result) == edits().plain
    assert result.stats.forwards.tolist() == [-(-checks.ANSWER // 7)] * checks.BATCH


@pytest.mark.parametrize("at", [0, 3, 9])
def test_drafting_resumes_after_an_edit(at):
    """Sources with one token replaced by one that the model never says: the output is plain, in few forwards."""
    result = with_source(lambda row: edit(row, at, checks.V + 1))
    assert toy.outputs(result) == edits().plain
    assert int(result.stats.accepted_by_depth.sum()) > 0
    assert int(result.stats.forwards.sum()) < checks.BATCH * checks.ANSWER


def test_the_pointer_follows_and_leaves_and_finds_again():
    """A script of one row: the source is 1 2 3 4 5 6, the output 1 2 9 4 5 6."""
    drafter = Aggressive(drafts=2)
    state = drafter.init(source([1, 2, 3, 4, 5, 6]), None, toy.sequence([0], size=12), None)
    observe = jax.jit(drafter.observe)

    def after(state, row, accepted, n):
        seq = toy.sequence([0, *row], prompt=1, size=12)
        verdict = Verdict(None, jnp.array([accepted]), None, None)
        return observe(None, state, seq, None, None, verdict, jnp.array([n]), None)

    assert state.next.tolist() == [0]
    state = after(state, [1, 2, 9], 2, 3)
    assert state.next.tolist() == [-1], "the token after the drafts was another: it occurs nowhere"
    state = after(state, [1, 2, 9, 4], 0, 1)
    assert state.next.tolist() == [4], "4 occurs once: on with what follows it"
    state = after(state, [1, 2, 9, 4, 5, 6], 1, 2)
    assert state.next.tolist() == [6], "the draft and the token after it both came from the source"


def test_greedy_output_is_plain_output():
    greedy = edits()
    greedy.own = source(*[greedy.plain[1]] * checks.BATCH, size=32)  # one for all rows: the checks change their order
    greedy.check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(Aggressive(drafts=2))
    tokens = jnp.broadcast_to(jnp.array([2, 0, 1, 3, 1]), (checks.ROWS, 5))
    z, accepted = checks.law(Aggressive(drafts=2), Source(tokens, jnp.full(checks.ROWS, 5)))
    assert z < 5 and accepted > 0


@dataclasses.dataclass(frozen=True)
class Successors:
    """A head that knows each token's usual successor: params i32[V]."""

    def __call__(self, params, target_params, seq, block):
        token, scores = seq.root, []
        for _ in range(block):
            token = params[token]
            scores.append(jax.nn.one_hot(token, params.shape[0]))
        return jnp.stack(scores, 1)


@functools.cache
def successors():
    """The most frequent successor of each token in the plain output."""
    counts = np.zeros((checks.V, checks.V))
    for row in edits().plain:
        np.add.at(counts, (row[:-1], row[1:]), 1)
    return jnp.asarray(counts.argmax(1), jnp.int32)


@pytest.mark.slow
def test_gad_at_its_limit_is_greedy():
    checks.Greedy(GAD(Successors(), block=3, beta=1, tau=0.0), successors()).check()


@pytest.mark.slow
def test_relaxed_gad_is_not_greedy():
    check = checks.Greedy(GAD(Successors(), block=3, beta=3, tau=3.0), successors())
    assert toy.outputs(check.result(3)) != check.plain
    assert toy.outputs(check.result(0)) == check.plain


@pytest.mark.slow
@pytest.mark.parametrize("rule", [TopBeta(1, 0.0), TopBeta(1, 100.0), TopBeta(5, 0.0)])
def test_each_setting_alone_makes_it_greedy(rule):
    law = jnp.asarray(np.random.default_rng(2).normal(size=(100, 4, V)), jnp.float32)
    tokens = jnp.argsort(-law[:, :3], -1)[..., 0].at[50:, 1].add(1) % V
    proposal = Proposal.of_chain(tokens, jnp.ones(tokens.shape, bool))
    got, want = (jax.jit(v.verify)(law, proposal, None) for v in (rule, Greedy()))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert want.n_accepted.tolist() == [3] * 50 + [1] * 50


def test_gad_brings_its_verifier():
    config = Config(drafter=GAD(Successors(), beta=2, tau=0.5))
    assert config.verifier_for(config.features_for(own=True), chain=True) == TopBeta(2, 0.5)


@dataclasses.dataclass(frozen=True)
class OwnScores(TopBeta):
    """Planted: a draft is judged by the scores after it, not by those after its parent."""

    def _fits(self, law, peak, proposal):
        shifted = dataclasses.replace(proposal, parent=proposal.parent + 1)
        return super()._fits(law, peak, shifted)


def verdicts(rule, tree, rows=200):
    """(accepted counts, next tokens) of random scores with ties, and the same by a plain reading of the rule."""
    rng = np.random.default_rng(1)
    parent = np.array([0, 0, 1, 2, 4] if tree else [0, 1, 2, 3, 4], np.int32)
    law = rng.integers(0, 6, (rows, 6, V)) / 2.0
    tokens = rng.integers(0, V, (rows, 5)).astype(np.int32)
    every = jnp.ones((rows, 5), bool)
    proposal = Proposal.of_chain(jnp.asarray(tokens), every)
    if tree:
        proposal = Proposal.of_tree(jnp.asarray(tokens), jnp.asarray(parent)[None], every, depth=3)
    verdict = jax.jit(rule.verify)(jnp.asarray(law, jnp.float32), proposal, None)
    want = []
    for scores, drafts in zip(law, tokens, strict=True):
        depth = {0: 0}
        for j, (p, token) in enumerate(zip(parent, drafts, strict=True), 1):
            rank = sorted(range(V), key=lambda t, s=scores[p]: (-s[t], t)).index(token)
            if p in depth and rank < rule.beta and scores[p].max() - scores[p][token] <= rule.tau:
                depth[j] = depth[p] + 1
        end = max(depth, key=depth.get)
        want.append((depth[end], int(np.argmax(scores[end]))))
    return list(zip(verdict.n_accepted.tolist(), verdict.next_token.tolist(), strict=True)), want


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("rule", [TopBeta(), TopBeta(2, 0.5), TopBeta(1, 0.0), TopBeta(5, 9.0)])
def test_the_rule_against_a_plain_reading(rule, tree):
    got, want = verdicts(rule, tree)
    assert got == want


def test_planted_bugs_are_seen():
    got, want = verdicts(OwnScores(), tree=False)
    assert got != want


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="drafts: got 0"):
        Aggressive(drafts=0)
    with pytest.raises(ConfigError, match="draft_params: got dict"):
        Aggressive().init({}, None, toy.sequence([1]), None)
    with pytest.raises(ConfigError, match="a Source of 2 rows, accepts 1"):
        Aggressive().init(source([1], [2]), None, toy.sequence([1]), None)
    with pytest.raises(ConfigError, match="tau: got -1"):
        GAD(Successors(), tau=-1)
    with pytest.raises(ConfigError, match="block: got 0"):
        GAD(Successors(), block=0)
