"""PPD: prompt slots guess, guesses are scored in a tree, and no output changes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.decode import PPD, Autoregressive, Chooser, Config, Features, Greedy, Sampling, Tree, Typical
from jaxinfer.decode import loop as decoding
from jaxinfer.decode.ppd import PPDState
from jaxinfer.decode.ppd_tree import SparseTree
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.measure import LatencyCurve
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.heads import TargetShape
from jaxinfer.models.heads.ppd import PPDHead
from tests import drafter_checks as checks
from tests import toy

V = checks.V
ACCEPTANCE = ((0.4, 0.2, 0.1), (0.3, 0.2, 0.1), (0.2, 0.1, 0.1))
HEAD = PPDHead(TargetShape(16, V), acceptance=ACCEPTANCE)
TWICE = dataclasses.replace(HEAD, copies=2)


def embeddings(head, seed=0, scale=4.0):
    shape = (head.prompts, head.copies, head.target.hidden_size)
    return {"prompts": scale * jax.random.normal(jax.random.key(seed), shape)}


@dataclasses.dataclass(frozen=True)
class Accepts(PPD):
    """Planted: prompt slots pass for drafts."""

    def propose(self, *arguments, **keywords):
        proposal, state = super().propose(*arguments, **keywords)
        return dataclasses.replace(proposal, probe=None), state


@dataclasses.dataclass(frozen=True)
class Late(PPD):
    """Planted: the guesses are read one slot late."""

    def observe(self, params, state, seq, proposal, scored, *rest):
        logits = jnp.roll(scored.logits, -1, 1)
        return super().observe(params, state, seq, proposal, dataclasses.replace(scored, logits=logits), *rest)


@functools.cache
def greedy():
    return checks.Greedy(PPD(HEAD, slots=12), embeddings(HEAD))


def test_greedy_output_is_plain_output():
    greedy().check()


def test_whole_trees_emit_more_tokens_a_forward():
    # The harness cuts drafts, prompt slots too, at the depth of the drafts: here the cut is below the last of them.
    deep = greedy().result(greedy().run.config.drafter.depth + HEAD.prompts)
    assert toy.outputs(deep) == greedy().plain
    assert float(deep.stats.tokens_per_forward) > 1.1
    assert (np.asarray(deep.stats.accepted_by_depth).sum(0)[:2] > 0).all()


def test_without_prompt_slots_it_is_plain_decoding():
    drafter = PPD(HEAD, trees=(SparseTree(),) * 4)
    run = toy.Run(checks.MODEL, Config(max_tokens=checks.ANSWER, drafter=drafter, features=Features()))
    sampling = Sampling.make(checks.BATCH, eos=[-1])
    tokens, lengths = checks.repetitive_prompts(0)
    result = run(checks.PARAMS, tokens, lengths, sampling=sampling, draft_params=embeddings(HEAD))
    assert toy.outputs(result) == greedy().plain
    assert int(result.stats.proposed.sum()) == 0
    np.testing.assert_array_equal(result.stats.forwards, result.stats.emitted)


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    head = PPDHead(TargetShape(4, 4), prompts=2, copies=2, acceptance=((0.5, 0.2, 0.1), (0.4, 0.2, 0.1)))
    checks.check_law(PPD(head, slots=8), embeddings(head, scale=1.0))


class Steps:
    """Decoding step by step, each state beside what a forward over the whole text and prompt tokens says."""

    def __init__(self, drafter):
        self.drafter, self.own = drafter, embeddings(drafter.head)
        self.run = toy.Run(checks.MODEL, Config(max_tokens=checks.ANSWER, drafter=drafter, features=Features()))
        tokens, lengths = checks.repetitive_prompts(1)
        sampling = Sampling.make(checks.BATCH, eos=[-1])
        self.begun = self.run.start(checks.PARAMS, tokens, lengths, sampling=sampling, draft_params=self.own)
        self.naive = jax.jit(self._naive)

    def _naive(self, seq):
        """Logits f32[B, prompts, V] of the prompt tokens after the last token but one: one chain at a time."""
        head, model = self.drafter.head, checks.MODEL
        text = model.embed(checks.PARAMS, seq.tokens)
        size, after = text.shape[1], seq.length - 1
        index = jnp.arange(size)[None]
        positions = jnp.where(index < after[:, None], index, -1)
        chain = after[:, None] + jnp.arange(head.prompts)
        total = 0.0
        for copy in range(head.copies):
            own = jnp.broadcast_to(self.own["prompts"][:, copy], (checks.BATCH, head.prompts, text.shape[2]))
            inputs = jnp.concatenate([text, own], 1)
            output, _ = model(checks.PARAMS, inputs, jnp.concatenate([positions, chain], 1))
            total += model.head(checks.PARAMS, output.hidden[:, size:])
        return total / head.copies

    def mismatches(self):
        """How many rows' guesses differ from the naive ones, and how many were compared, over a whole generation."""
        state, wrong, seen = self.begun, 0, 0
        while not bool(state.seq.done.all()):
            state = self.run.advance(checks.PARAMS, state, steps=1, draft_params=self.own)
            wanted = jax.lax.top_k(self.naive(state.seq), self.drafter.candidates)[1]
            known, guesses = state.drafter.known, state.drafter.guesses
            live = np.asarray((jnp.arange(guesses.shape[1]) < known[:, None]) & ~state.seq.done[:, None])
            seen += live.sum()
            wrong += ((np.asarray(guesses) != np.asarray(wanted)).any(2) & live).sum()
        return wrong, seen


@pytest.fixture(scope="module")
def steps():
    return Steps(PPD(TWICE, slots=20))


@pytest.mark.slow
def test_guesses_are_what_prompt_tokens_after_the_text_say(steps):
    wrong, seen = steps.mismatches()
    assert wrong == 0 and seen > 40


def test_guesses_read_at_the_wrong_slot_are_seen():
    wrong, seen = Steps(Late(HEAD, slots=12)).mismatches()
    assert wrong > seen / 4


def test_a_prompt_slot_changes_no_other_slot(steps):
    """Of all slots only those move that hold a changed embedding, and the later ones of their own chain."""
    drafter, config = steps.drafter, steps.run.config
    state = steps.run.advance(checks.PARAMS, steps.begun, steps=2, draft_params=steps.own)

    @jax.jit
    def logits(own):
        proposal, pending = decoding.propose(checks.PARAMS, state, config=config, draft_params=own)
        scored, _ = decoding.score(checks.MODEL, checks.PARAMS, pending, proposal, config=config)
        return scored.logits, proposal.valid

    before, valid = map(np.asarray, logits(steps.own))
    after, _ = logits({"prompts": steps.own["prompts"].at[1, 0].add(1.0)})
    prompt = drafter.layout.prompt[np.asarray(state.drafter.known)]
    moved = np.isin(prompt, [2, 4]) & valid  # the first copy of prompt tokens 1 and 2, of two copies each
    assert moved.any() and (valid & ~moved).any()
    root, found = np.split((before != np.asarray(after)).any(2), [1], 1)
    assert not root.any()
    np.testing.assert_array_equal(found & valid, moved)


def probes_on_the_path(drafter, verifier):
    """Prompt slots on the verified path where the target says, at every slot, the token that prompt slots carry."""
    own, known = embeddings(drafter.head), np.array([0, 3])
    seq = toy.sequence([1, 2], [3], vocab_size=V)

    @jax.jit
    def verified():
        guesses = jnp.broadcast_to(1 + jnp.arange(3), (2, 3, 3))
        state = PPDState(jnp.asarray(known), guesses)
        proposal, _ = drafter.propose(own, state, seq, None, None, target_params=None, warp=None)
        law = jnp.full((2, drafter.width + 1, V), -jnp.inf).at[..., 0].set(0.0)
        return verifier.verify(law, proposal, jax.random.split(jax.random.key(0), 2)).path

    path = np.asarray(verified())
    prompt = drafter.layout.prompt[known]
    return sum(int((prompt[row, path[row][path[row] > 0] - 1] >= 0).sum()) for row in range(2))


def test_no_verifier_accepts_a_prompt_slot():
    for verifier in (Greedy(), Tree(), Typical()):
        assert probes_on_the_path(PPD(HEAD, slots=12), verifier) == 0


def test_a_prompt_slot_that_is_accepted_is_seen():
    assert probes_on_the_path(Accepts(HEAD, slots=12), Greedy()) > 0


@pytest.mark.slow
def test_a_tree_over_rings_and_quantized_weights_changes_nothing():
    config = ModelConfig(
        vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32,
        max_length=64, windows=(6,), embedding_scale=2.0,
    )  # fmt: skip
    step = Step(config)
    weights = jax.jit(lambda key: quant.apply(step.init(key), [(".*(mlp|attention).*", quant.Int8())]))(
        jax.random.key(1)
    )
    tokens, lengths = toy.prompts(3, 3, 10, V, lengths=[1, 10, 6])
    plain, tree = (
        toy.outputs(toy.Run(step, Config(max_tokens=10, eos=(), drafter=d))(weights, tokens, lengths, draft_params=own))
        for d, own in ((Autoregressive(), None), (PPD(HEAD, slots=12), embeddings(HEAD)))
    )
    assert tree == plain


def test_the_machines_curve_picks_the_size(monkeypatch):
    def picked(curve):
        monkeypatch.setattr(Chooser, "measured", lambda drafter, *_, **__: Chooser(drafter, curve))
        return PPD.measured(HEAD, checks.MODEL, checks.PARAMS, batch=1, capacity=32, sizes=(2, 8))

    assert picked(LatencyCurve((1, 64), (1.0, 1.0))) == PPD(HEAD, slots=8)
    assert picked(LatencyCurve((1, 2), (1.0, 2.0))) == Autoregressive()


def test_impossible_settings_are_refused():
    nothing: Any = None
    with pytest.raises(ConfigError, match="needs a head of kind ppd, got none"):
        PPD(nothing)
    with pytest.raises(ConfigError, match="rows of acceptance, needs 3: measure it"):
        PPD(dataclasses.replace(HEAD, acceptance=()))
    with pytest.raises(ConfigError, match=r"trees: got 1, accepts one for each of 0 to 3"):
        PPD(HEAD, trees=(SparseTree(),))
    with pytest.raises(ConfigError, match=r"trees\[0\]: .* accepts 0 levels"):
        PPD(HEAD, trees=(SparseTree((0,), (0,), (1, 0)),) * 4)
    with pytest.raises(ConfigError, match="ranks up to 9, accepts up to 6"):
        PPD(HEAD, trees=(*(SparseTree(),) * 3, SparseTree((0,), (9,), (0, 0))))
    with pytest.raises(InputError, match=r"draft_params/prompts: got shape None, the head needs \(3, 1, 16\)"):
        PPD(HEAD).init(None, None, toy.sequence([1]), nothing)
    with pytest.raises(ConfigError, match="copies: got 0"):
        dataclasses.replace(HEAD, copies=0)
