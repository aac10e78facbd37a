"""HAMburger generation: against a plain program without a cache, which runs the forward that training runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer import decode, ops, quant
from jaxinfer.decode import Config, Features, Sampling, hamburger
from jaxinfer.decode.hamburger import Smashing
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig
from jaxinfer.models.hamburger import Hamburger
from jaxinfer.models.step import Step
from tests import toy

V, ANSWER, WIDTH, SIZE = 29, 12, 6, 4
STEP = Step(
    ModelConfig(
        vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24,
        max_length=64, embedding_scale=2.0,
    )
)  # fmt: skip
MODEL = Hamburger(STEP, size=SIZE, layers=1, mlp_size=16, merge_heads=2)
TOKENS, LENGTHS = toy.prompts(1, 4, WIDTH, V, lengths=[1, 6, 4, 3])
# One program for rows that are greedy, sampled or penalised: what a row asks for is data.
CONFIG = Config(max_tokens=ANSWER, eos=(), features=Features(sample=True, penalties=True, **dict.fromkeys(
    ("top_k", "top_p", "min_p", "bias", "min_tokens", "forced"), False)))  # fmt: skip
HALF = Smashing(0.5)


def random_params(seed=0):
    """Every weight matters, and about half of the stops say stop."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: MODEL.init(key, STEP.init(key)), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)
    params["stop"]["head"] *= 2
    return params


PARAMS = random_params()


@functools.cache
def programs(smashing):
    """`begin` and `advance`, compiled once; all settings of equal room begin alike."""
    first = Smashing(room=smashing.room)
    begin = functools.partial(hamburger.begin, MODEL, config=CONFIG, smashing=first)
    advance = functools.partial(hamburger.advance, MODEL, config=CONFIG, smashing=smashing)
    return jax.jit(begin) if first == smashing else programs(first)[0], jax.jit(advance)


def run(smashing=HALF, *, params=PARAMS, tokens=TOKENS, lengths=LENGTHS, steps=ANSWER, row_ids=None, **sampling):
    """The state after some macro steps."""
    begin, advance = programs(smashing)
    settings = Sampling.make(4, **{"eos": [-1], "max_tokens": ANSWER, **sampling})
    row_ids = jnp.arange(4) if row_ids is None else row_ids
    state = begin(params, tokens, lengths, sampling=settings, row_ids=row_ids, key=jax.random.key(0))
    return advance(params, state, steps=steps)


def generate(smashing=HALF, **more):
    return decode.result(run(smashing, **more), CONFIG)


plain = toy.Run(STEP, CONFIG)


def plainly(params=PARAMS, **sampling):
    settings = Sampling.make(4, eos=[-1], max_tokens=ANSWER, **sampling)
    return toy.outputs(plain(params["base"], TOKENS, LENGTHS, sampling=settings))


@jax.jit
def _naive_step(params, tokens, sizes, positions, count, so_far):
    """The logits f[S, V] of each token of the group after macro step `count - 1`, and the stop logits f[S]."""
    output, _ = MODEL.macro(params, tokens[None], sizes[None], positions[None])
    features = MODEL.features(params, output)[0, count - 1][None]
    hidden = jnp.concatenate([output.hidden[:, count - 1][:, None], MODEL.micro_hidden(params, features, so_far)], 1)[0]
    return MODEL.head(params, hidden), MODEL.stop(params, hidden)


def naive(row, *, late=0, confidence=0.5, params=PARAMS):
    """(answer, group sizes) of prompt `row`; `late`: how far behind their place groups of the answer stand."""
    prompt = np.asarray(TOKENS)[row][: int(LENGTHS[row])].tolist()
    groups, positions, answer, found = [[t] for t in prompt], list(range(len(prompt))), [], []
    while len(answer) < ANSWER:
        tokens, sizes, at = np.zeros((20, SIZE), np.int32), np.zeros(20, np.int32), np.full(20, -1, np.int32)
        for i, (group, position) in enumerate(zip(groups, positions, strict=True)):
            tokens[i, : len(group)], sizes[i], at[i] = group, len(group), position
        new = []
        while len(new) < SIZE:
            so_far = np.zeros((1, SIZE), np.int32)
            so_far[0, : len(new)] = new
            logits, stops = _naive_step(params, tokens, sizes, at, len(groups), so_far)
            new.append(int(jnp.argmax(logits[len(new)])))
            if 1 - 1 / (1 + np.exp(-float(stops[len(new) - 1]))) < confidence:
                break
        answer, found = answer + new, [*found, len(new)]
        groups.append(new)
        positions.append(len(prompt) + len(answer) - 1 + late)
    return answer[:ANSWER], found


@pytest.mark.slow
def test_output_is_that_of_a_program_without_a_cache_in_ragged_batches():
    result = generate()
    wanted = [naive(row) for row in range(4)]
    assert toy.outputs(result) == [answer for answer, _ in wanted]
    assert result.stats.forwards.tolist() == [len(sizes) for _, sizes in wanted]
    assert {size for _, sizes in wanted for size in sizes} >= {1, 2, SIZE}
    late = [naive(row, late=1)[0] for row in range(4)]  # what published generation does
    assert late != toy.outputs(result)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_merging_output_is_plain_decoding_of_the_base(temperature):
    wanted = plainly(temperature=temperature)
    assert toy.outputs(generate(Smashing(1.0), temperature=temperature)) == wanted
    assert toy.outputs(generate(temperature=temperature)) != wanted


def test_a_row_depends_on_neither_neighbours_nor_place():
    first, order = toy.outputs(generate(temperature=1.0)), jnp.asarray([2, 0, 3, 1])
    moved = generate(temperature=1.0, tokens=TOKENS[order], lengths=LENGTHS[order], row_ids=order)
    assert toy.outputs(moved) == [first[i] for i in order.tolist()]
    changed = toy.outputs(generate(temperature=1.0, tokens=TOKENS.at[1].set(0)))  # another neighbour
    assert [changed[i] for i in (0, 2, 3)] == [first[i] for i in (0, 2, 3)]
    assert changed[1] != first[1]


def test_end_tokens_and_limits_cut_inside_a_group():
    whole = toy.outputs(generate())
    cut = 0
    for token in range(0, V, 2):
        result = generate(eos=[token])
        found = toy.outputs(result)
        assert found == [row[: row.index(token) + 1] if token in row else row for row in whole], token
        cut += found != whole
    assert cut > 3
    for limit in range(1, 6):
        assert toy.outputs(generate(max_tokens=limit)) == [row[:limit] for row in whole]


def test_the_cache_holds_one_entry_a_macro_step():
    state = run(steps=2)
    np.testing.assert_array_equal(state.cache.t, LENGTHS + 1)
    assert (state.seq.length > LENGTHS + 2).any()
    ends = state.seq.length - state.drafter.n - 1  # of the last entry
    np.testing.assert_array_equal(state.cache.states[0].pos[:, 0].max(-1), ends)


def test_a_full_cache_ends_the_row_and_room_says_when():
    state = run(steps=1)
    capacity = state.cache.states[0].pos.shape[-1]
    assert capacity == WIDTH + ANSWER
    states = tuple(dataclasses.replace(s, t=s.t.at[1].set(capacity - 1)) for s in state.cache.states)
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, states=states))
    after = programs(HALF)[1](PARAMS, state, steps=1).seq
    assert after.done.tolist() == [False, True, False, False]
    assert int(after.reason[1]) == decode.Reason.LENGTH
    roomy = functools.partial(hamburger.begin, MODEL, config=CONFIG, smashing=Smashing(0.5, room=0.25))
    cache = jax.eval_shape(roomy, PARAMS, TOKENS, LENGTHS, key=jax.random.key(0)).cache
    assert cache.states[0].pos.shape[-1] == WIDTH + ANSWER // 4


def test_scoring_repeats_generation_and_its_probabilities_are_a_law():
    """A prompt of one token, whose answer is scored in the groups that wrote it; then all texts of two more tokens."""
    result = generate()
    one = int(jnp.argmin(LENGTHS))
    assert int(LENGTHS[one]) == 1
    texts, lengths = np.zeros((1 + V * V, 1 + ANSWER), np.int32), np.full(1 + V * V, 3, np.int32)
    texts[0], lengths[0] = np.asarray(TOKENS)[one, :1].tolist() + toy.outputs(result)[one], 1 + ANSWER
    texts[1:, :3] = np.stack(np.meshgrid(5, range(V), range(V), indexing="ij"), -1).reshape(-1, 3)
    score = jax.jit(functools.partial(hamburger.score, MODEL, smashing=HALF))
    nll, steps = score(PARAMS, jnp.asarray(texts), jnp.asarray(lengths))
    assert int(steps[0]) == int(result.stats.forwards[one])
    assert not nll[0, 0] and (nll[0, 1:] > 0).all() and not nll[1:, 3:].any()
    np.testing.assert_allclose(jnp.exp(-nll[1:].sum(1)).sum(), 1, rtol=1e-4)


def test_penalties_see_the_group_so_far():
    for row in toy.outputs(generate(presence_penalty=1e4)):
        assert len({*row}) == len(row)
    assert any(len({*row}) < len(row) for row in toy.outputs(generate()))


@pytest.mark.slow
def test_weights_may_be_quantized():
    rules = [(r"(base|micro)/.*/(attention|mlp)/.*", quant.Int4(group=8))]
    int4 = quant.apply(PARAMS, rules)
    same = jax.tree.map(ops.materialize, int4, is_leaf=ops.is_weight)
    assert toy.outputs(generate(params=int4)) == toy.outputs(generate(params=same)) != toy.outputs(generate())


def refused(model=MODEL, config=CONFIG):
    hamburger.begin(model, PARAMS, TOKENS, LENGTHS, config=config, key=jax.random.key(0))


def test_what_is_not_to_be_had_is_refused_by_name():
    with pytest.raises(ConfigError, match="confidence: got 0"):
        Smashing(0)
    with pytest.raises(ConfigError, match=r"room: got 1\.5"):
        Smashing(room=1.5)
    with pytest.raises(ConfigError, match="drafter: got PromptLookup"):
        refused(config=dataclasses.replace(CONFIG, drafter=decode.PromptLookup()))
    with pytest.raises(ConfigError, match="logprobs: got 1"):
        refused(config=dataclasses.replace(CONFIG, logprobs=1))
    with pytest.raises(ConfigError, match="size: got 1, accepts an integer of 2"):
        Hamburger(STEP, size=1)
    with pytest.raises(ConfigError, match=r"taps: got \(2,\)"):
        Hamburger(STEP, taps=(2,))
    with pytest.raises(ConfigError, match="merge_heads: got 3"):
        Hamburger(STEP, merge_heads=3)

    @dataclasses.dataclass(frozen=True)
    class Sinks:
        def spec(self, attention, capacity, dtype):
            return kv.Sink(attention, sinks=2, window=8, dtype=dtype)

    with pytest.raises(ConfigError, match="cache: got Sink"):
        refused(dataclasses.replace(MODEL, base=dataclasses.replace(STEP, cache=Sinks())))
