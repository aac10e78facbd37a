"""The language-model recipe and the built-in corpus: what is held out, packed, counted and optimised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.step import Step
from jaxinfer.train import data, lm, loop

STEP = Step(ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_length=128,
    tie_embeddings=True,
))  # fmt: skip


@pytest.fixture(scope="module")
def params():
    params = lm.init_params(STEP, jax.random.key(0))
    rng = np.random.default_rng(1)  # no zeros: every weight matters
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), params)


@pytest.fixture(scope="module")
def losses(params):
    """-log p of each target of one window of a stream, whatever its length: one program, padded to 64 positions."""
    program = jax.jit(lambda batch: lm.token_losses(STEP, params, batch))

    def run(window, **changes):
        batch = data.pack(np.asarray(window)[None]) | changes
        n = batch["ids"].shape[1]
        padded = {k: np.pad(v, ((0, 0), (0, 64 - n)), constant_values=-(k == "positions")) for k, v in batch.items()}
        return np.asarray(program(padded))[0, :n]

    return run


def test_every_tenth_module_is_held_out_and_no_test():
    names = [f"m{i:02}.py" for i in range(23)] + [
        "test/a.py",
        "pkg/tests/b.py",
        "idlelib/idle_test/c.py",
        "pkg/test.py",
    ]
    modules, tests, held_out = data.split(names[::-1])
    assert held_out == ["m00.py", "m10.py", "m20.py"]
    assert tests == ["idlelib/idle_test/c.py", "pkg/tests/b.py", "test/a.py"]
    assert sorted(modules + tests + held_out) == sorted(names)


def test_the_corpus_skips_installed_packages_empty_files_and_other_encodings(tmp_path):
    for name, content in {
        "a.py": b"x = 1\n", "b.py": b"y = 2\n", "empty.py": b"", "latin.py": b"# \xe9\n", "test/t.py": b"z = 3\r\n",
        "site-packages/p.py": b"no\n", "notes.txt": b"no\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = data.standard_library(tmp_path)
    found = [[document.name for document in part] for part in (corpus.modules, corpus.tests, corpus.held_out)]
    assert found == [["b.py"], ["test/t.py"], ["a.py"]]
    assert corpus.tests[0].text == "z = 3\r\n"
    with pytest.raises(ConfigError, match="no Python sources"):
        data.standard_library(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_tokenizer_is_lossless_and_transformers_reads_it(tmp_path):
    text = "def f(self, x):\n    return 'Grüße, \u4f60\u597d' + x\r\n\n\n\tclass  A: pass\n"
    tokenizer = data.train_tokenizer([text] * 3, vocab_size=280)
    assert tokenizer.get_vocab_size() == 280
    assert [tokenizer.token_to_id(name) for name in (data.END_OF_TEXT, data.PAD)] == [0, 1]
    document = data.Document("a.py", text)
    (ids,) = data.encode(tokenizer, [document])
    assert ids.dtype == np.uint16 and tokenizer.decode(ids.tolist()) == text
    data.save_tokenizer(tokenizer, tmp_path, max_length=128)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == ids.tolist() and theirs.decode(ids.tolist()) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)


def test_packed_documents_cost_what_they_cost_alone(losses):
    first, second = np.arange(1, 12), np.arange(20, 40)
    stream = data.concatenate([first, second])
    batch = data.pack(stream[None])
    assert batch["positions"][0].tolist() == [*range(12), *range(21)]
    apart = np.concatenate([losses([0, *d, 0]) for d in (first, second)])
    np.testing.assert_allclose(losses(stream), apart, atol=1e-5)
    across = losses(stream, segments=np.zeros_like(batch["segments"]))  # the planted bug: attention across documents
    assert np.abs(across - apart).max() > 1e-2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_windows_score_every_position_once_with_enough_context(length, window, draw):
    stride = draw.draw(st.integers(1, window))
    seen = np.zeros(length, int)
    for start, first in lm.evaluation_windows(length, window=window, stride=stride):
        end = min(start + window, length)
        assert start == 0 or (first - start >= window - stride and end == start + window)
        seen[first:end] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("window", [40, 16])
def test_bits_per_byte_counts_each_token_once(params, losses, window):
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 64, n).astype(np.uint16) for n in (5, 16, 37)]
    by_hand = 0.0
    for document in documents:
        stream = np.concatenate([[0], document])
        for start, first in lm.evaluation_windows(len(document), window=window, stride=8):
            by_hand += losses(stream[start : start + window + 1])[first - start :].sum()
    if window == 40:  # no document is longer: one window each
        assert by_hand == pytest.approx(sum(losses([0, *document]).sum() for document in documents))
    found = lm.bits_per_byte(STEP, params, documents, num_bytes=100, window=window, stride=8, batch=4)
    assert found == pytest.approx(by_hand / np.log(2) / 100, rel=1e-5)


def test_a_stream_is_a_function_of_the_step_and_each_pass_covers_all_windows():
    modules, tests = np.arange(1, 1000, dtype=np.uint16), np.arange(2000, 2600, dtype=np.uint16)
    stages = lm.stages([(8, 0.5, 0.75), (16, 0.5, 1.0)], steps=60, tokens=32)
    assert stages == (data.Stage(0, 4, 8, 0.75), data.Stage(30, 2, 16, 1.0))
    stream = data.Stream(modules, tests, stages, seed=3)
    again = data.Stream(modules, tests, stages, seed=3)
    for step in (0, 29, 30, 59):
        batch, other = stream(step), again(step)
        assert all((batch[name] == other[name]).all() for name in batch)
        assert batch["ids"].shape == ((4, 8) if step < 30 else (2, 16))
        assert (batch["targets"][:, :-1] == batch["ids"][:, 1:]).all()
    assert (data.Stream(modules, tests, stages, seed=4)(0)["ids"] != stream(0)["ids"]).any()
    rows = np.concatenate([stream(step)["ids"] for step in range(30)])
    assert (rows[:, 0] < 2000).sum() == 90 and (rows[:, 0] >= 2000).sum() == 30  # three to one
    long = data.Stream(modules, tests, (data.Stage(0, 4, 8, 1.0),), seed=3)
    windows = (len(modules) - 1) // 8 - 1
    starts = np.concatenate([long(step)["ids"][:, 0] for step in range(2 * windows // 4 + 1)])
    first, second = starts[:windows], starts[windows : 2 * windows]
    assert len(set(first)) == windows and len(set(second)) == windows and (first != second).any()


def test_schedule_and_stages_refuse_what_cannot_be():
    schedule = lm.warmup_stable_decay(2.0, steps=100, warmup=10, decay=0.25)
    assert [float(schedule(step)) for step in (0, 9, 74, 75, 87, 99)] == pytest.approx([0.2, 2, 2, 2, 1.04, 0.08])
    with pytest.raises(ConfigError, match="warmup must be"):
        lm.warmup_stable_decay(1.0, steps=60, warmup=50)
    with pytest.raises(ConfigError, match="sum to 1"):
        lm.stages([(8, 0.5, 1.0)], steps=10, tokens=32)
    with pytest.raises(ConfigError, match="no whole number of windows"):
        lm.stages([(7, 1.0, 1.0)], steps=10, tokens=32)
    with pytest.raises(ConfigError, match="stride"):
        lm.evaluation_windows(10, window=4, stride=5)


def test_muon_moves_hidden_matrices_and_adam_the_rest():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (64, 16), "head": (16, 64), "final_norm": (16,), "gate": (3, 16, 20)}
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    optimizer = lm.muon(lambda count: 1.0, weight_decay=0.0)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    for expert in updates["gate"]:
        values = np.linalg.svd(expert, compute_uv=False) / (0.2 * np.sqrt(20))
        assert 0.6 < values.min() and values.max() < 1.3  # orthogonal, as far as five Newton-Schulz steps go
    for name in ("embedding", "head", "final_norm"):
        moved = -np.asarray(updates[name]) * np.sign(grads[name])  # Adam's first step: one length for all elements
        np.testing.assert_allclose(moved, moved.flat[0], rtol=1e-2)
        assert moved.flat[0] > 0.5


def test_blocks_begin_as_the_identity():
    params = lm.init_params(STEP, jax.random.key(0))["layers_0"]
    assert not np.asarray(params["mlp"]["down"]).any() and not np.asarray(params["attention"]["o"]).any()
    assert np.std(params["mlp"]["gate"]) == pytest.approx(0.25, rel=1e-3)


def test_the_recipe_learns_what_there_is_to_learn():
    words = np.tile(np.arange(2, 10, dtype=np.uint16), 100)
    stream = data.Stream(words, words, (data.Stage(0, 4, 16),), seed=0)
    optimizer = lm.muon(optax.constant_schedule(1e-2))
    recipe = loop.Recipe(objective=lm.NextToken(STEP), data=stream, optimizer=optimizer)
    state = loop.init_state(lm.init_params(STEP, jax.random.key(0)), recipe, jax.random.key(1))
    train_step = jax.jit(loop.make_train_step(recipe))
    losses = []
    for step in range(30):
        state, metrics = train_step(state, recipe.data(step))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(64), abs=0.3) and losses[-1] < 0.3


def test_a_batch_splits_into_microbatches():
    batch = {"ids": np.arange(24).reshape(4, 6)}
    assert lm.split_batch(batch, 1) is batch
    assert lm.split_batch(batch, 2)["ids"][1, 0].tolist() == list(range(12, 18))


def test_a_share_of_the_windows_repeats_a_stretch():
    rng = np.random.default_rng(0)
    modules = np.concatenate([[0], 1 + rng.permutation(9000), [0]]).astype(np.uint16)
    stages = (data.Stage(0, 8, 128),)
    plain, copied = (data.Stream(modules, modules, stages, 3, copies=share) for share in (0.0, 0.5))
    gaps, changed = set(), 0
    for step in range(8):
        for before, after in zip(plain(step)["ids"], copied(step)["ids"], strict=True):
            if (before == after).all():
                continue
            changed += 1
            start = int(np.flatnonzero(before != after)[0])
            [source] = np.flatnonzero(before == after[start])
            length = next((i for i in range(1, 128 - start) if after[start + i] == after[start]), 128 - start)
            assert 128 // 16 <= length <= 64 and source + length <= start
            np.testing.assert_array_equal(after[start:], np.resize(before[source : source + length], 128 - start))
            gaps.add(start > source + length)
    assert 20 < changed < 44 and gaps == {True, False}
    np.testing.assert_array_equal(copied(5)["ids"], copied(5)["ids"])


def test_no_stretch_is_copied_over_the_end_of_a_document():
    window = np.arange(1, 130)
    window[64] = 0
    for made in (data.repeat_stretch(window, np.random.default_rng(i)) for i in range(50)):
        places = np.flatnonzero(made != window)
        assert made[64] == 0 and (places > 64).all() and (made[places] > 65).all()


def test_the_second_appearance_of_a_stretch_is_scored_apart(params):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 64, 60) for _ in range(3)] + [rng.integers(1, 64, 10)]
    first, again = lm.losses_of_copies(STEP, params, documents, length=16, batch=2)
    stretches = np.stack([d[20:36] for d in documents[:3]])
    rows = np.concatenate([np.zeros((3, 1)), stretches, stretches], 1).astype(np.int64)
    losses = np.asarray(jax.jit(lm.token_losses, static_argnums=0)(STEP, params, data.pack(rows)))
    np.testing.assert_allclose((first, again), (losses[:, :16].mean(), losses[:, 16:].mean()), rtol=1e-5)
