"""Greedy decoding with drafts equals greedy decoding without, token for token, and the caches stay what they should be.

One compiled program serves every draft length, script, end token, limit and penalty here: they are all data.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import Config, Features, Reason, Sampling
from jaxinfer.decode.verify import Greedy
from jaxinfer.models import ModelConfig, Step
from tests import toy

V, ROOM, WIDTH = 7, 10, 6
MODEL, DRAFT = toy.Attentive(V), toy.Attentive(V)
PARAMS, OTHER = MODEL.params(0), MODEL.params(1)
LENGTHS = {1: [4], 3: [6, 1, 4]}
FEATURES = Features(penalties=True, bias=True, min_tokens=True, forced=True)


@pytest.fixture(scope="module")
def plain():
    return toy.Run(MODEL, Config(max_tokens=ROOM, features=FEATURES))


@pytest.fixture(scope="module")
def scripted():
    return toy.Run(MODEL, Config(max_tokens=ROOM, features=FEATURES, drafter=toy.Scripted(5)))


@pytest.fixture(scope="module")
def drafted():
    return toy.Run(MODEL, Config(max_tokens=ROOM, drafter=decode.DraftModel(DRAFT, 5)))


def prompts(batch):
    return toy.prompts(0, batch, WIDTH, V, lengths=LENGTHS[batch])


def sampling(batch, **values):
    """Every list has a place, so that all cases share one program."""
    defaults = dict(max_tokens=ROOM, eos=[-1], bias_ids=[-1], bias_values=[0.0], forced=[-1, -1])
    return Sampling.make(batch, **{**defaults, **values})


def script_of(result, batch):
    """The buffer `i32[B, T]` that holds the prompts and then `result`'s tokens."""
    tokens, lengths = (np.asarray(x) for x in prompts(batch))
    script = np.zeros((batch, WIDTH + ROOM), np.int32)
    for row, output in enumerate(toy.outputs(result)):
        script[row, : lengths[row]] = tokens[row, : lengths[row]]
        script[row, lengths[row] : lengths[row] + len(output)] = output
    return script


def spoil(script, kind):
    """The oracle's script made wrong everywhere, at random, or on every third position."""
    rng = np.random.default_rng(1)
    wrong = dict(oracle=0.0, adversary=1.0, random=0.5).get(kind)
    mask = np.arange(script.shape[1]) % 3 == 0 if wrong is None else rng.random(script.shape) < wrong
    return np.where(mask, (script + rng.integers(1, V, script.shape)) % V, script).astype(np.int32)


def same(a, b):
    assert toy.outputs(a) == toy.outputs(b)
    np.testing.assert_array_equal(a.finish_reason, b.finish_reason)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_draft_gives_the_plain_output(plain, scripted, batch):
    """gamma 0, 1, 2, 5, and one for each row; oracle, adversary, random and sparse errors."""
    rows = sampling(batch)
    want = plain(PARAMS, *prompts(batch), sampling=rows)
    assert (want.lengths == ROOM).all() and (want.stats.forwards == ROOM).all()
    right = script_of(want, batch)
    for kind in ("oracle", "adversary", "random", "every third"):
        for gamma in (0, 1, 2, 5, [1, 5, 0][:batch]):
            gamma = jnp.broadcast_to(jnp.asarray(gamma, jnp.int32), (batch,))
            draft = {"script": spoil(right, kind), "gamma": gamma}
            got = scripted(PARAMS, *prompts(batch), sampling=rows, draft_params=draft)
            same(got, want)
            if kind == "oracle":
                np.testing.assert_array_equal(got.stats.forwards, -(-ROOM // (gamma + 1)))
            if kind == "adversary":
                np.testing.assert_array_equal(got.stats.forwards, ROOM)
                assert int(got.stats.accepted_by_depth.sum()) == 0
    assert float(got.stats.tokens_per_forward) == float(got.stats.emitted.sum() / got.stats.forwards.sum())


def test_end_tokens_and_limits_at_every_offset(plain, scripted):
    """An end token, and a limit, at each place of a block of six; rows with nothing to do stay as they are."""
    right = script_of(plain(PARAMS, *prompts(3), sampling=sampling(3)), 3)
    draft = {"script": right, "gamma": jnp.full(3, 5)}
    for offset in range(ROOM + 1):
        limits = (offset + np.array([0, 3, 7])) % (ROOM + 1)
        ends = right[np.arange(3), np.asarray(LENGTHS[3]) + offset - 1][:, None]
        for rows in (sampling(3, max_tokens=limits), sampling(3, eos=ends), sampling(3, eos=ends, max_tokens=limits)):
            want = plain(PARAMS, *prompts(3), sampling=rows)
            same(scripted(PARAMS, *prompts(3), sampling=rows, draft_params=draft), want)
            for output, reason, limit, end in zip(
                toy.outputs(want),
                want.finish_reason,
                np.asarray(rows.max_tokens),
                np.asarray(rows.eos)[:, 0],
                strict=True,
            ):
                assert end not in output[:-1]
                assert reason == (Reason.EOS if output and output[-1] == end else Reason.LENGTH)
                assert len(output) == limit or reason == Reason.EOS


@pytest.mark.parametrize(
    "values",
    [dict(repetition_penalty=1.4), dict(presence_penalty=1.5, frequency_penalty=0.8), dict(frequency_penalty=-0.7),
     dict(bias_ids=[2], bias_values=[-np.inf]), dict(forced=[3, 3]), dict(eos=[2], min_tokens=6),
     dict(repetition_penalty=[1.0, 1.3, 0.8], frequency_penalty=[0.5, 0, 1], forced=[[-1, 4], [1, -1], [2, 2]])],
)  # fmt: skip
def test_penalties_and_bans_inside_blocks(plain, scripted, values):
    """What a draft block does to history is what one token at a time does."""
    rows = sampling(3, **values)
    want = plain(PARAMS, *prompts(3), sampling=rows)
    assert toy.outputs(want) != toy.outputs(plain(PARAMS, *prompts(3), sampling=sampling(3)))
    for gamma in (2, 5):
        draft = {"script": script_of(want, 3), "gamma": jnp.full(3, gamma)}
        got = scripted(PARAMS, *prompts(3), sampling=rows, draft_params=draft)
        same(got, want)
        assert (got.stats.forwards == -(-want.lengths // (gamma + 1))).all()


@pytest.mark.slow
def test_draft_model_and_its_cache(plain, drafted):
    """gamma as data, a poor draft and the target as its own; both caches against a fresh prefill at every step."""
    tokens, lengths = prompts(3)
    want = plain(PARAMS, tokens, lengths, sampling=sampling(3))
    for params in (OTHER, PARAMS):
        for gamma in (1, 2, 5):
            state = drafted.start(PARAMS, tokens, lengths, draft_params=params)
            state = dataclasses.replace(state, drafter=dataclasses.replace(state.drafter, gamma=jnp.full(3, gamma)))
            got = drafted.finish(PARAMS, state, params)
            same(got, want)
            if params is PARAMS:
                np.testing.assert_array_equal(got.stats.forwards, -(-ROOM // (gamma + 1)))
                assert float(got.stats.acceptance_by_depth[:gamma].min()) == 1.0
    assert errors_of_caches(drafted, tokens, lengths) < 1e-4


@jax.jit
def compare(seq, length, params, cache):
    """Logits at `length - 1` through the cache against a forward without one; and how many tokens it is off."""
    at = jnp.maximum(length - 1, 0)
    last = jnp.where(length > 0, at, -1)
    output, _ = MODEL(params, seq.token_at(at)[:, None], last[:, None], cache)
    index = jnp.arange(seq.tokens.shape[1])[None]
    full, _ = MODEL(params, seq.tokens, jnp.where(index < length[:, None], index, -1))
    fresh = jnp.take_along_axis(full.hidden, at[:, None, None], 1)
    difference = jnp.abs(MODEL.head(params, output.hidden) - MODEL.head(params, fresh)).max((1, 2))
    return jnp.where(length > 0, difference, 0).max(), cache.t - jnp.maximum(length - 1, 0)


def errors_of_caches(run, tokens, lengths):
    """The largest difference, over all steps and rows, between logits through either cache and a fresh full forward."""

    state = run.start(PARAMS, tokens, lengths, draft_params=OTHER)
    worst = 0.0
    while True:
        for params, cache, behind in ((PARAMS, state.cache, 0), (OTHER, state.drafter.cache, 1)):
            error, offset = compare(state.seq, state.seq.length - behind, params, cache)
            np.testing.assert_array_equal(offset, 0)
            worst = max(worst, float(error))
        if state.seq.done.all():
            return worst
        state = run.advance(PARAMS, state, steps=1, draft_params=OTHER)


@dataclasses.dataclass(frozen=True)
class Planted(Greedy):
    """Bug 1: right tokens, but the keys of the neighbouring slots are kept. Bug 2: the first rejected draft is kept."""

    bug: jax.Array | int = 0

    def verify(self, law, proposal, key):
        verdict = super().verify(law, proposal, key)
        moved = jnp.roll(jnp.maximum(verdict.path, 0), 1, 1)
        extra = jnp.minimum(verdict.n_accepted + 1, proposal.depth)
        return dataclasses.replace(
            verdict,
            path=jnp.where(self.bug == 1, moved, verdict.path),
            n_accepted=jnp.where(self.bug == 2, extra, verdict.n_accepted),
        )


def test_the_tests_see_planted_bugs(plain, drafted):
    tokens, lengths = prompts(3)
    want = toy.outputs(plain(PARAMS, tokens, lengths, sampling=sampling(3)))

    def advance(params, state, bug, **kwargs):
        config = dataclasses.replace(drafted.config, verifier=Planted(bug=bug))
        return decode.advance(MODEL, params, state, config=config, **kwargs)

    advance = jax.jit(advance)
    run = toy.Run(MODEL, drafted.config)
    run.begin = drafted.begin
    for bug, wrong_cache, wrong_text in ((0, False, False), (1, True, None), (2, None, True)):
        run.advance = functools.partial(advance, bug=bug)
        assert wrong_cache is None or (errors_of_caches(run, tokens, lengths) > 1e-2) == wrong_cache
        text = toy.outputs(run(PARAMS, tokens, lengths, draft_params=OTHER))
        assert wrong_text is None or (text != want) == wrong_text


def test_trees(plain):
    """A tree whose right path is not contiguous: equal output, and the kept path's keys move to the front."""
    tokens, lengths = prompts(3)
    want = plain(PARAMS, tokens, lengths, sampling=sampling(3))
    run = toy.Run(MODEL, Config(max_tokens=ROOM, drafter=toy.Branching()))
    for kind, forwards in (("oracle", -(-ROOM // 3)), ("every third", None), ("adversary", None)):
        got = run(PARAMS, tokens, lengths, draft_params={"script": spoil(script_of(want, 3), kind)})
        same(got, want)
        assert forwards is None or (got.stats.forwards == forwards).all()


def test_prefill_in_chunks_of_any_size():
    """Chunks of 3 leave the caches, the draft's too, as one chunk does; the invariant is t = length - 1."""
    tokens, lengths = toy.prompts(2, 3, 9, V, lengths=[9, 1, 5])
    drafter = decode.DraftModel(DRAFT, 1)
    states = [
        toy.Run(MODEL, Config(prefill_chunk=chunk, drafter=drafter)).start(PARAMS, tokens, lengths, draft_params=OTHER)
        for chunk in (256, 3)
    ]
    for a, b in zip(*(jax.tree.leaves((state.cache, state.drafter)) for state in states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(states[0].cache.t, lengths - 1)
    np.testing.assert_array_equal(states[0].drafter.cache.t, np.maximum(lengths - 2, 0))


@pytest.mark.slow
def test_the_real_decoder_with_a_ring_and_a_dense_layer():
    """Windows shorter than the text, a ring cache, an unrelated draft and a twin: plain output, and no cache copied."""
    config = ModelConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
        max_length=64, tie_embeddings=True, windows=(9, None), eos=(0,),
    )  # fmt: skip
    model = Step(config)
    params, other = (jax.tree.map(lambda x: 8 * x, model.init(jax.random.key(seed))) for seed in (0, 1))
    tokens, lengths = toy.prompts(3, 3, 12, 40, lengths=[12, 1, 7])
    run = dict(config=Config(max_tokens=24, prefill_chunk=5), key=jax.random.key(0))
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    want = generate(model, params, tokens, lengths, **run)
    run["config"] = dataclasses.replace(run["config"], drafter=decode.DraftModel(model, 3))
    program = generate.lower(model, params, tokens, lengths, draft_params=other, **run).compile()
    assert toy.cache_copies(program, jax.eval_shape(lambda: model.new_cache(3, 36))) == []
    run.pop("config")
    same(program(params, tokens, lengths, draft_params=other, **run), want)
    twin = program(params, tokens, lengths, draft_params=params, **run)
    same(twin, want)
    assert float(twin.stats.acceptance_by_depth.min()) > 0.9
