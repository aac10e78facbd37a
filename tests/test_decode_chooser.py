"""The choice of a draft length: expectations against plain sums, when a row stops and tries again, and exactness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import Chooser, Config, CopySpec, DraftModel, Features, Proposal, Sampling, TokenRecycling, Verdict
from jaxinfer.decode.chooser import FORGET, PRIOR, WEIGHT
from jaxinfer.errors import ConfigError
from jaxinfer.measure import LatencyCurve
from jaxinfer.models import ModelConfig, Step
from tests import drafter_checks as checks
from tests import toy

OTHER = checks.MODEL.params(5, scale=0.5)
ALIKE = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, checks.PARAMS, OTHER)
DRAFT = checks.MARKOV.params(1, scale=1.2)
FLAT, STEEP = LatencyCurve((1, 9), (1.0, 1.2)), LatencyCurve((1, 9), (1.0, 9.0))
MILD = LatencyCurve((1, 2, 9), (1.0, 1.3, 4.5))


def chooser(curve=FLAT, **options):
    return Chooser(DraftModel(checks.MODEL, 4), curve, **options)


def test_greedy_output_is_plain_output():
    checks.Greedy(chooser(MILD, draft=LatencyCurve((1, 2), (0.1, 0.2))), ALIKE).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(Chooser(DraftModel(checks.MARKOV, 2), MILD), DRAFT)


def fresh(c, batch=1):
    return decode.chooser.ChooserState.empty((), batch, c.width)


def test_before_anything_is_seen_a_chain_is_geometric():
    c = chooser()
    np.testing.assert_allclose(c.chances(fresh(c))[0], PRIOR ** np.arange(1, 5), rtol=1e-5)


def test_chances_of_a_tree_against_plain_products():
    rng = np.random.default_rng(0)
    c = Chooser(Shaped(6), FLAT)
    parent = np.array([0, 0, 1, 1, 2, 3])
    reached = rng.integers(1, 9, 6).astype(np.float32)
    stood = np.floor(reached * rng.random(6)).astype(np.float32)
    state = dataclasses.replace(
        fresh(c), reached=jnp.asarray(reached[None]), stood=jnp.asarray(stood[None]), parent=jnp.asarray(parent[None])
    )
    rank = [0, 1, 0, 1, 0, 0]
    mean = (stood.sum() + WEIGHT * PRIOR) / (sum(r for r, k in zip(reached, rank, strict=True) if k == 0) + WEIGHT)
    mean = min(mean, 1.0)
    given = [(s + WEIGHT * mean * (1 - mean) ** k) / (r + WEIGHT) for s, r, k in zip(stood, reached, rank, strict=True)]
    chance = [1.0]
    for j in range(6):
        chance.append(given[j] * chance[parent[j]])
    np.testing.assert_allclose(c.chances(state)[0], chance[1:], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Shaped(decode.drafter.DrafterBase):
    width: int
    depth: int = 3


def test_the_size_with_the_most_tokens_a_second_is_taken():
    """Against all sizes tried by hand, on random counts."""
    rng = np.random.default_rng(1)
    c = chooser(MILD, draft=LatencyCurve((1, 2), (0.1, 0.2)), sizes=(1, 2, 3, 4))
    reached = rng.integers(1, 40, (200, 4)).astype(np.float32)
    stood = np.floor(reached * rng.random((200, 4)) ** 0.1).astype(np.float32)
    state = dataclasses.replace(fresh(c, 200), reached=jnp.asarray(reached), stood=jnp.asarray(stood))
    sizes, chances = np.asarray(c.choose(state, jnp.ones(200, bool)).size), np.asarray(c.chances(state))
    for row in range(200):
        rates = [(1 + chances[row, :m].sum()) / (MILD(m + 1) + 0.1 * m) for m in range(1, 5)]
        want = int(np.argmax(rates)) + 1 if max(rates) >= 1.1 else 0
        assert sizes[row] == want
    assert len(set(sizes.tolist())) >= 4


def step(c, state, accepted, proposed=None):
    """One step of a row of which `accepted` drafts stand."""
    state = c.choose(state, jnp.ones(1, bool))
    size = int(state.size[0]) if proposed is None else proposed
    tokens = jnp.zeros((1, c.width), jnp.int32)
    proposal = Proposal.of_chain(tokens, jnp.arange(c.width)[None] < size)
    n = min(accepted, size)
    path = jnp.where(jnp.arange(c.width + 1) <= n, jnp.arange(c.width + 1), -1)[None]
    return c.count(state, proposal, Verdict(path, jnp.array([n]), jnp.array([0]), jnp.array([True]))), size


@pytest.mark.slow
def test_a_row_that_gains_nothing_stops_and_tries_once_in_64_steps():
    c, sizes = chooser(MILD), []
    state = fresh(c)
    for _ in range(300):
        state, size = step(c, state, 0)
        sizes.append(size)
    tries = np.flatnonzero(sizes)
    assert 1 <= tries[0] + 1 <= 3
    late = tries[tries > 20]
    assert len(late) == 4 and set(np.diff(late)) == {64}
    for _ in range(300):  # the text becomes easy: it is noticed
        state, size = step(c, state, 4)
    assert size > 0


def test_together_the_rows_take_what_pays_for_all():
    """One row's drafts stand and three rows' fall: alone, the one drafts and all pay. A finished row has no say."""
    reached = jnp.full((4, 4), 20.0)
    stood = jnp.zeros((4, 4)).at[0].set(20.0)
    c = chooser(MILD)
    state = dataclasses.replace(fresh(c, 4), reached=reached, stood=stood)
    live = jnp.ones(4, bool)
    alone = c.choose(state, live).size
    assert int(alone[0]) > 0 and alone[1:].tolist() == [0, 0, 0]
    c = dataclasses.replace(c, together=True)
    assert c.choose(state, live).size.tolist() == [0] * 4
    assert c.choose(state, jnp.arange(4) < 1).size.tolist() == [int(alone[0])] * 4
    waiting = dataclasses.replace(state, waited=jnp.array([63, 63, 63, 0]))
    assert c.choose(waiting, live).size.tolist() == [0] * 4
    assert int(c.choose(waiting, jnp.arange(4) < 3).size.min()) > 0


def test_steps_in_which_nothing_was_proposed_teach_nothing():
    c = chooser()
    before, _ = step(c, fresh(c), 4)
    after, _ = step(c, before, 0, proposed=0)
    np.testing.assert_array_equal(after.reached, before.reached)
    np.testing.assert_array_equal(after.stood, before.stood)
    forgotten, _ = step(c, before, 0)
    np.testing.assert_allclose(forgotten.stood, FORGET * before.stood)


@pytest.mark.slow
def test_where_scoring_costs_what_it_emits_nothing_is_drafted():
    """And then a step is a plain one: the forward is of width 1, and the draft model does not run."""
    tokens, lengths = checks.repetitive_prompts()
    for curve, drafts in ((STEEP, False), (FLAT, True)):
        run = toy.Run(checks.MODEL, Config(max_tokens=20, drafter=chooser(curve), features=Features()))
        state = run.start(
            checks.PARAMS, tokens, lengths, sampling=Sampling.make(4, eos=[-1], max_tokens=20), draft_params=ALIKE
        )
        state = run.advance(checks.PARAMS, state, steps=12, draft_params=ALIKE)
        assert bool(state.stats.proposed.sum() > 0) == drafts
        assert bool((state.drafter.inner.cache.t > np.maximum(lengths - 2, 0)).all()) == drafts


@pytest.mark.slow
def test_a_row_chooses_from_its_own_past_alone():
    tokens, lengths = checks.repetitive_prompts()
    config = Config(max_tokens=20, drafter=chooser(MILD), features=Features(sample=True))
    run = toy.Run(checks.MODEL, config)

    def go(rows):
        sampling = Sampling.make(4, eos=[-1], max_tokens=20, temperature=1.0)
        result = run(
            checks.PARAMS, tokens[rows], lengths[rows], sampling=sampling, row_ids=jnp.asarray(rows), draft_params=ALIKE
        )
        return toy.outputs(result), np.asarray(result.stats.proposed_by_depth)

    text, proposed = go(np.arange(4))
    for row in range(4):
        other, counts = go(np.full(4, row))
        assert other[0] == text[row]
        np.testing.assert_array_equal(counts[0], proposed[row])


@dataclasses.dataclass(frozen=True)
class Counted(toy.Attentive):
    """Records the width of every forward that is compiled."""

    def __call__(self, params, inputs, *args, **kwargs):
        WIDTHS.add(inputs.shape[1])
        return super().__call__(params, inputs, *args, **kwargs)


WIDTHS: set = set()


@pytest.mark.slow
def test_every_size_has_its_forward_and_trees_are_cut_like_chains():
    """The tree of tests/toy.py, cut at 2 drafts, at 3 and at none, gives plain output."""
    model = Counted(checks.V)
    tokens, lengths = checks.repetitive_prompts()
    plain = toy.Run(checks.MODEL, Config(max_tokens=20, features=Features()))(checks.PARAMS, tokens, lengths)
    script = np.zeros((4, checks.WIDTH + 20), np.int32)
    for row, (n, text) in enumerate(zip(np.asarray(lengths), toy.outputs(plain), strict=True)):
        script[row, n : n + 20] = text
    WIDTHS.clear()
    for sizes, curve in (((2, 5), FLAT), ((3,), STEEP)):
        drafter = Chooser(toy.Branching(), curve, sizes=sizes)
        got = toy.Run(model, Config(max_tokens=20, drafter=drafter, features=Features()))(
            checks.PARAMS, tokens, lengths, draft_params={"script": jnp.asarray(script)}
        )
        assert toy.outputs(got) == toy.outputs(plain)
        assert bool(got.stats.accepted_by_depth.sum() > 0) == (curve is FLAT)
    assert {1, 3, 4, 6} <= WIDTHS


@pytest.mark.slow
def test_no_cache_is_copied():
    size = dict(vocab_size=40, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=48, max_length=64, eos=(0,))
    model = Step(ModelConfig(hidden_size=32, head_dim=8, tie_embeddings=True, **size))
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    tokens, lengths = toy.prompts(3, 3, 12, 40, lengths=[12, 1, 7])
    program = generate.lower(
        model, model.init(jax.random.key(0)), tokens, lengths, key=jax.random.key(0),
        config=Config(max_tokens=24, drafter=Chooser(CopySpec(), FLAT)),
    ).compile()  # fmt: skip
    assert toy.cache_copies(program, jax.eval_shape(lambda: model.new_cache(3, 36))) == []


@pytest.mark.slow
def test_curves_are_measured_on_the_machine():
    c = Chooser.measured(
        DraftModel(checks.MODEL, 4), checks.MODEL, checks.PARAMS, batch=2, capacity=16, draft_params=OTHER
    )
    assert c.sizes == (1, 2, 4) and c.target.sizes == (1, 2, 3, 5) and min(c.target.seconds) > 0
    assert c.draft is not None and 0 < c.draft(1) < c.draft(2) < c.draft(4) and hash(c) == hash(c)
    assert c.drafter.lazy and c.step is checks.MODEL and c.vocab_size == checks.V
    copies = Chooser.measured(CopySpec(), checks.MODEL, checks.PARAMS, batch=2, capacity=16, sizes=(10,))
    assert copies.draft is None and not hasattr(copies, "step") and copies.sizes == (10,)


def test_impossible_settings_are_refused():
    for options, message in (
        (dict(sizes=(5,)), "sizes"), (dict(sizes=(0, 1)), "sizes"), (dict(sizes=(2, 2)), "sizes"),
        (dict(probe=63), "probe: got 63"), (dict(gain=0.5), "gain: got 0.5"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            chooser(**options)
    with pytest.raises(ConfigError, match="drafts nothing"):
        Chooser(decode.Autoregressive(), FLAT)


@dataclasses.dataclass(frozen=True)
class Asking(Chooser):
    """Never says that it is idle, so that the drafter is asked in every step."""

    def idle(self, params, state, seq):
        return None


@dataclasses.dataclass(frozen=True)
class Forgetful(Chooser):
    """The bug: plain steps do not count towards the wait."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        after = super().observe(params, state, seq, proposal, scored, verdict, n, cache)
        return after if proposal.tokens.shape[1] else dataclasses.replace(after, waited=state.waited)


COPIES, LEARNS = CopySpec(2, 4), TokenRecycling(nodes=4)  # which learns in plain steps too


@pytest.mark.slow
def test_plain_steps_change_no_choice():
    """Rows that copy here and there, or never: what each drafts and says is as if the drafter were always asked."""
    tokens, lengths = checks.repetitive_prompts()

    def go(kind, inner=COPIES, **options):
        drafter = kind(inner, MILD, **options)
        run = toy.Run(checks.MODEL, Config(max_tokens=300, drafter=drafter, features=Features(sample=True)))
        sampling = Sampling.make(4, eos=[-1], max_tokens=300, temperature=1.5)
        result = run(checks.PARAMS, tokens, lengths, sampling=sampling)
        return toy.outputs(result), np.asarray(result.stats.proposed_by_depth).tolist()

    for options in ({}, {"together": True}, {"inner": LEARNS}):
        asked = go(Asking, **options)
        assert go(Chooser, **options) == asked
        assert any(map(sum, asked[1]))
    assert go(Forgetful) != go(Asking)


def test_tries_that_cost_much_are_rarer():
    c = chooser(STEEP)
    assert [c.wait(m) for m in c.sizes] == [64, 100, 200]
    assert chooser(FLAT).wait(4) == 64
