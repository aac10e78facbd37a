"""HAMburger's training: the rule that cuts text, the batches, the objective against one without batches, the recipe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.hamburger import Hamburger, load_parts, save_parts
from jaxinfer.models.step import Step
from jaxinfer.train import data, hamburger, lm, loop

V, SIZE, END = 32, 4, 0
STEP = Step(ModelConfig(
    vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_length=128,
    tie_embeddings=True,
))  # fmt: skip
MODEL = Hamburger(STEP, size=SIZE, layers=1, mlp_size=16, merge_heads=2)


@pytest.fixture(scope="module")
def params():
    """Every weight matters."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: MODEL.init(key, STEP.init(key)), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def by_hand(entropy, alone, size=SIZE):
    """Group sizes of one text, as the card says it: a list a group of entropies."""
    groups = []
    for h, single in zip(entropy, alone, strict=True):
        group = groups[-1] if groups else None
        if group and not single and group != "closed" and len(group) < size and (h < 0.05 or h < 0.3 * max(group)):
            group.append(h)
        else:
            groups.append([h])
            if single:
                groups.append("closed")
    return [len(group) for group in groups if group != "closed"]


def test_groups_follow_the_entropies():
    rng = np.random.default_rng(0)
    entropy = rng.exponential(1.0, (6, 80)) ** 3
    alone = rng.random((6, 80)) < 0.1
    begins = hamburger.first_of_group(entropy, alone, size=SIZE)
    for i in range(6):
        starts = np.flatnonzero(begins[i])
        assert np.diff(np.append(starts, 80)).tolist() == by_hand(entropy[i], alone[i])
    assert {1, 2, 3, 4} <= {*np.diff(np.flatnonzero(begins[0])).tolist()}

    def sizes(*values):
        begins = hamburger.first_of_group(np.array([values]), np.zeros((1, len(values)), bool))[0]
        return np.diff(np.append(np.flatnonzero(begins), len(values))).tolist()

    assert sizes(0.01, 0.04, 0.01, 0.02, 0.01) == [4, 1]  # low joins low; four at most
    assert sizes(2.0, 0.5, 0.59, 0.7) == [3, 1]  # 0.3 times the largest, not the last
    assert sizes(0.1, 0.06, 0.01) == [1, 2]


def small_batch():
    windows = np.array([[0, 5, 6, 7, 8, 9, 0, 3, 4, 2, 1, 7]])
    begins = np.array([[1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]], bool)
    trained = np.arange(12)[None] >= 2
    return windows, begins, trained


def test_a_batch_pairs_each_group_with_the_next_at_the_place_of_its_last_token():
    windows, begins, trained = small_batch()
    batch = hamburger.group(windows, begins, trained, size=SIZE, steps=8, micro=3)
    assert batch["sizes"].tolist() == [[1, 1, 3, 1, 1, 2, 0, 0]]  # of the last, cut by the window, nothing is known
    assert batch["positions"].tolist() == [[0, 1, 4, 5, 0, 2, -1, -1]]  # from the document's start
    assert batch["segments"][0, :6].tolist() == [1, 1, 1, 1, 2, 2]
    assert batch["target_sizes"].tolist() == [[1, 3, 1, 1, 2, 1, 0, 0]]
    assert batch["stops"].tolist() == [[0, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["several"].tolist() == [[1, 4, 8]]
    assert batch["tokens"][0, 2].tolist() == [6, 7, 8, 0] == batch["targets"][0, 1].tolist()
    short = hamburger.group(windows, begins, trained, size=SIZE, steps=3, micro=3)
    assert all((short[k] == batch[k][:, :3]).all() for k in ("tokens", "positions", "target_sizes", "stops"))


def test_the_loss_is_that_of_groups_taken_one_by_one(params):
    """Document by document, group by group, each with the forward of a batch of its own."""
    windows, begins, trained = small_batch()
    batch = hamburger.group(windows, begins, trained, size=SIZE, steps=8, micro=3)
    objective = jax.jit(hamburger.Smash(MODEL))
    loss, metrics = objective(params, batch, None)

    @jax.jit
    def write(tokens, sizes, positions, target, count):
        output, _ = MODEL.macro(params, tokens[None], sizes[None], positions[None])
        hidden = MODEL.micro_hidden(params, MODEL.features(params, output)[:, count - 1], target[None])
        hidden = jnp.concatenate([output.hidden[:, count - 1][:, None], hidden], 1)[0]
        last = MODEL.stop(params, hidden)
        return jax.nn.log_softmax(MODEL.head(params, hidden)), jax.nn.log_sigmoid(jnp.stack([last, -last]))

    losses, stops = [], []
    for first, steps in ((0, 4), (4, 2)):  # two documents
        for count in range(1, steps + 1):
            rows = slice(first, first + 4)
            m = first + count - 1
            size, target = int(batch["target_sizes"][0, m]), batch["targets"][0, m]
            seen = np.where(np.arange(4) < count, batch["positions"][0, rows], -1)
            logp, decided = write(batch["tokens"][0, rows], batch["sizes"][0, rows], seen, target, count)
            losses += [-float(logp[i, target[i]]) for i in range(size)]
            if batch["stops"][0, m]:
                stops += [-float(decided[0 if i == size - 1 else 1, i]) for i in range(size)]
    assert len(losses) == int(metrics["weight"]) == 9
    np.testing.assert_allclose(metrics["stop"], np.mean(stops), rtol=1e-4)
    np.testing.assert_allclose(loss, np.mean(losses) + 0.5 * np.mean(stops), rtol=1e-4)
    late = {**batch, "positions": np.where(batch["positions"] > 1, batch["positions"] + 1, batch["positions"])}
    assert abs(float(objective(params, late, None)[0]) - float(loss)) > 1e-3  # the published slip


def test_a_group_of_one_is_the_plain_embedding_and_others_know_their_order(params):
    merge = jax.jit(MODEL.merge)
    tokens, n = jnp.asarray([[5, 6, 7, 8], [5, 9, 9, 9], [6, 5, 0, 0], [5, 6, 1, 2]]), jnp.asarray([1, 1, 2, 2])
    found = merge(params, tokens, n)
    embedding = np.asarray(params["base"]["embedding"])
    np.testing.assert_array_equal(found[:2], embedding[[5, 5]])
    assert jnp.abs(found[2] - found[3]).max() > 1e-3
    np.testing.assert_allclose(merge(params, tokens.at[3, 2:].set(7), n)[3], found[3], rtol=1e-6)
    unwritten = {**params, "embedder": {**params["embedder"], "o": jnp.zeros_like(params["embedder"]["o"])}}
    np.testing.assert_allclose(merge(unwritten, tokens, n)[3], embedding[[5, 6]].mean(0), rtol=1e-5)


@pytest.fixture(scope="module")
def recipe():
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(1, V, 12), 40).astype(np.uint16)
    tokens[::61] = END
    stream = data.Stream(tokens, tokens, (data.Stage(0, 2, 24),), 0)
    base = lm.init_params(STEP, jax.random.key(1))
    schedule = lm.warmup_stable_decay(3e-2, steps=24, warmup=2)
    return hamburger.recipe(MODEL, base, stream, schedule=schedule)


def fresh(recipe):
    base = jax.tree.map(jnp.array, recipe.data.params)  # the loop updates in place
    return loop.init_state(MODEL.init(jax.random.key(0), base), recipe, jax.random.key(2))


@pytest.mark.slow  # Muon takes long to compile; the loop's own tests resume a small recipe
def test_a_resumed_run_ends_in_the_same_bits_and_learns(recipe, tmp_path):
    config = loop.LoopConfig(steps=24, save_every=12, curve=False)
    whole = loop.train(recipe, fresh(recipe), config, tmp_path / "whole")
    rows = [row["loss"] for row in loop.record.read(tmp_path / "whole" / "metrics.jsonl")]
    assert np.mean(rows[-4:]) < 0.8 * np.mean(rows[:4])
    loop.train(recipe, fresh(recipe), dataclasses.replace(config, steps=12), tmp_path / "parts")
    resumed = loop.train(recipe, fresh(recipe), config, tmp_path / "parts")
    assert [row["loss"] for row in loop.record.read(tmp_path / "parts" / "metrics.jsonl")] == rows
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    start = fresh(recipe).params["base"]
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, whole.params["base"]))) > 0


def test_the_base_learns_at_its_own_rate_and_not_at_all_at_none():
    params = {name: {"w": jnp.eye(4), "b": jnp.ones(4)} for name in ("base", "embedder", "micro", "stop")}
    grads = jax.tree.map(jnp.ones_like, params)
    moved = {}
    for rate in (0.0, 0.5, 1.0):
        optimizer = hamburger.optimizer(lambda count: 1e-2, base_rate=rate)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        moved[rate] = {k: float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(updates[k]))) for k in ("base", "micro")}
    assert moved[0.0]["base"] == 0 < moved[0.0]["micro"] == moved[1.0]["micro"]
    np.testing.assert_allclose(2 * moved[0.5]["base"], moved[1.0]["base"], rtol=1e-5)
    with pytest.raises(ConfigError, match="base_rate: got -1"):
        hamburger.optimizer(lambda count: 1e-2, base_rate=-1)


def test_what_is_added_is_kept_beside_the_base(params, tmp_path):
    save_parts(tmp_path, dataclasses.replace(MODEL, taps=(0,)), params, dtype="float32")
    model, found = load_parts(tmp_path, STEP, params["base"])
    assert model == dataclasses.replace(MODEL, taps=(0,))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(ConfigError, match="trained with another base"):
        load_parts(tmp_path, STEP, jax.tree.map(lambda x: x + 1, params["base"]))
    (tmp_path / "hamburger.json").write_text('{"settings": {"taps": null, "layers": 2}, "base": null}')
    with pytest.raises(CheckpointError, match=r"micro/layers_0/mlp/down: got shape \(16, 16\), .* needs \(32, 16\)"):
        load_parts(tmp_path, STEP, params["base"])
    (tmp_path / "hamburger.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the description of a HAMburger: KeyError"):
        load_parts(tmp_path, STEP, params["base"])
