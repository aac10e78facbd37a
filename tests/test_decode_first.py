"""FiRST: a row's layers are chosen by its prompt, once; skipped layers store nothing; all layers is the base model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer import decode, quant
from jaxinfer.decode import Config, First, PromptLookup, open_routers
from jaxinfer.decode.first import Gated, GatedState, load_first, routed, save_routers
from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.adapters import save_adapter
from tests import toy

V, LAYERS, ANSWER = 11, 2, 8
STEP = Step(ModelConfig(
    vocab_size=V, hidden_size=16, num_layers=LAYERS, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24,
    max_length=64, windows=(None, 6),
))  # fmt: skip
FIRST = First(STEP)
TOKENS, LENGTHS = toy.prompts(1, 4, 10, V, lengths=[1, 10, 6, 9])
CONFIG = Config(max_tokens=ANSWER, eos=(), prefill_chunk=4)  # chunks smaller than the prompts: one decision for all


def base():
    params = jax.jit(STEP.init)(jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params)


@pytest.fixture(scope="module")
def params():
    """Routers of which some say yes and some no, differently in each row."""
    rng = np.random.default_rng(13)
    router = jnp.asarray(rng.normal(0, 3.0, (LAYERS, 16)), jnp.float32)
    return {**base(), "first": {"router": router, "bias": jnp.zeros(LAYERS)}}


@functools.cache
def run(step, config=CONFIG):
    return toy.Run(step, config)


@pytest.fixture(scope="module")
def gates(params):
    found = np.asarray(jax.jit(FIRST.route)(params, TOKENS, LENGTHS)) >= 0.5
    assert 0 < found.sum() < found.size and len({tuple(row) for row in found.tolist()}) > 2
    return found


@jax.jit
def whole(params, tokens, lengths, gates):
    """Logits f32[B, T, V] of whole texts under given decisions, without a cache."""
    index = jnp.arange(tokens.shape[1])[None]
    live = index < lengths[:, None]
    output, _ = routed(STEP, params, tokens, jnp.where(live, index, -1), prompt=live, gates=gates)
    return STEP.head(params, output.hidden)


def greedy(params, gates):
    """Plain greedy continuation, each token from a forward over the whole text."""
    tokens, lengths = np.pad(np.asarray(TOKENS), ((0, 0), (0, ANSWER))), np.asarray(LENGTHS).copy()
    for _ in range(ANSWER):
        best = np.asarray(whole(params, tokens, lengths, gates)).argmax(-1)
        rows = np.arange(len(lengths))
        tokens[rows, lengths] = best[rows, lengths - 1]
        lengths += 1
    return [row[n - ANSWER : n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def test_an_answer_is_that_of_the_chosen_layers(params, gates):
    got = run(FIRST)(params, TOKENS, LENGTHS)
    assert toy.outputs(got) == greedy(params, gates)
    assert toy.outputs(got) != greedy(params, np.ones_like(gates))


def test_all_routers_open_is_the_base_model_to_the_bit(params):
    opened = {**params, "first": open_routers(STEP.config)}
    first, plain = run(FIRST).start(opened, TOKENS, LENGTHS), run(STEP).start(params, TOKENS, LENGTHS)
    first, plain = run(FIRST).advance(opened, first, steps=6), run(STEP).advance(params, plain, steps=6)
    np.testing.assert_array_equal(first.seq.tokens, plain.seq.tokens)
    for layer, base_layer in zip(first.cache.states, plain.cache.states, strict=True):
        jax.tree.map(np.testing.assert_array_equal, layer.inner, base_layer)


def test_a_skipped_layer_stores_nothing(params, gates):
    state = run(FIRST).start(params, TOKENS, LENGTHS)
    state = run(FIRST).advance(params, state, steps=3)
    np.testing.assert_array_equal(state.cache.t, LENGTHS + 2)
    for i, layer in enumerate(state.cache.states):
        np.testing.assert_array_equal(layer.inner.t, np.where(gates[:, i], LENGTHS + 2, 0))
        np.testing.assert_array_equal((layer.inner.pos >= 0).any((1, 2)), gates[:, i])
        assert not np.asarray(layer.inner.k)[~gates[:, i]].any()


def test_a_decision_moves_with_its_row(params, gates):
    state = run(FIRST).start(params, TOKENS, LENGTHS)
    want = toy.outputs(run(FIRST).finish(params, state))
    order = np.array([2, 0, 3, 1])
    moved = decode.reorder(run(FIRST).advance(params, state, steps=2), order)
    assert toy.outputs(run(FIRST).finish(params, moved)) == [want[i] for i in order]
    alone = run(FIRST).start(params, TOKENS[jnp.array([1] * 4)], LENGTHS[jnp.array([1] * 4)])
    placed = decode.place(state, jnp.array([3, 9, 9, 9]), alone)
    assert toy.outputs(run(FIRST).finish(params, placed)) == [*want[:3], want[1]]
    np.testing.assert_array_equal(placed.cache.states[0].runs[3], gates[1, 0])


@pytest.mark.slow
def test_under_a_drafter_and_over_quantized_weights(params):
    weights = quant.apply(params, [(r"layers_.*", quant.Int8())])
    drafted = dataclasses.replace(CONFIG, drafter=PromptLookup(drafts=3))
    plain = run(FIRST)(weights, TOKENS, LENGTHS)
    assert toy.outputs(run(FIRST, drafted)(weights, TOKENS, LENGTHS)) == toy.outputs(plain)


def test_a_layer_that_no_row_needs_is_not_run(params):
    """Its weights are not read: rubbish in them changes nothing; where one row needs it, the others do not see it."""
    shut = {"router": jnp.zeros((LAYERS, 16)), "bias": jnp.array([1.0, -1.0])}
    broken = {**params, "layers_1": jax.tree.map(lambda x: x * jnp.nan, params["layers_1"]), "first": shut}
    got = run(FIRST).finish(params=broken, state=opened(broken))
    assert np.asarray(got.finish_reason).tolist() == [1] * 4  # the limit, not an error
    assert toy.outputs(got) == toy.outputs(run(FIRST).finish(params={**params, "first": shut}, state=opened(broken)))


def opened(params):
    """The state after prefill with the second layer shut in every row; the routers' own pass runs every layer."""
    sane = jax.tree.map(lambda x: jnp.nan_to_num(x), params)
    return run(FIRST).start(sane, TOKENS, LENGTHS)


def test_no_cache_is_copied_in_the_loop(params):
    state = run(FIRST).start(params, TOKENS, LENGTHS)
    step = functools.partial(decode.advance, FIRST, config=CONFIG, steps=4)
    compiled = jax.jit(step, donate_argnums=1).lower(params, state).compile()
    assert toy.cache_copies(compiled, state.cache) == []


@dataclasses.dataclass(frozen=True)
class StoresSkipped(Gated):
    """Planted: keys of skipped layers are kept too, as a mask alone would have it."""

    def commit(self, state, block, path, n, notes=None):
        return GatedState(self.inner.commit(state.inner, block, path, n, notes), state.runs, state.t + n)


@dataclasses.dataclass(frozen=True)
class DecidesByChunk(First):
    """Planted: the decision is taken from the prompt's first chunk."""

    def read_prompt(self, params, cache, tokens, lengths):
        return super().read_prompt(params, cache, tokens[:, :4], jnp.minimum(lengths, 4))


@dataclasses.dataclass(frozen=True)
class OneForAll(First):
    """Planted: the batch decides together."""

    def route(self, params, tokens, lengths):
        rho = super().route(params, tokens, lengths)
        return jnp.broadcast_to(rho.mean(0, keepdims=True), rho.shape)


@dataclasses.dataclass(frozen=True)
class Stores(First):
    def new_cache(self, batch, capacity):
        cache = super().new_cache(batch, capacity)
        return kv.Cache(cache.states, tuple(StoresSkipped(spec.inner) for spec in cache.specs))


def test_planted_bugs_are_seen(params, gates):
    for step, sound in ((FIRST, True), (DecidesByChunk(STEP), False), (OneForAll(STEP), False)):
        opened = jax.jit(step.read_prompt)(params, step.new_cache(4, 24), TOKENS, LENGTHS)
        runs = np.stack([layer.runs for layer in opened.states], 1)
        assert (runs == gates).all() == sound


def test_keys_that_a_skipped_layer_stored_are_seen(params, gates):
    state = run(Stores(STEP)).start(params, TOKENS, LENGTHS)
    assert any((np.asarray(layer.inner.t) > 0)[~gates[:, i]].any() for i, layer in enumerate(state.cache.states))


def test_a_folder_brings_routers_and_adapter_to_their_model(params, tmp_path):
    plain = {name: leaf for name, leaf in params.items() if name != "first"}
    adapted = quant.adapt(plain, [(r"layers_0/.*", quant.Lora(rank=2))], jax.random.key(0))
    save_routers(tmp_path, params)
    step, loaded = load_first(STEP, plain, tmp_path)
    assert step == FIRST
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    save_adapter(STEP.config, adapted, tmp_path / "adapter")
    assert quant.adapters(load_first(STEP, plain, tmp_path)[1]).keys() == {"layers_0"}
    with pytest.raises(ConfigError, match="another model"):
        load_first(STEP, {**plain, "embedding": plain["embedding"] + 1}, tmp_path)
    with pytest.raises(CheckpointError, match="no first.safetensors"):
        load_first(STEP, plain, tmp_path / "adapter")


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(ConfigError, match="window: got 0"):
        First(STEP, window=0)
    with pytest.raises(InputError, match="params/first: got none"):
        FIRST.route({k: v for k, v in params.items() if k != "first"}, TOKENS, LENGTHS)
