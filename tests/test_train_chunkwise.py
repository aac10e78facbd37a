"""Training by chunks: SeCO has the gradient of the whole sequence, SpaCO on average, in the memory of a chunk."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import quant
from jaxinfer.cli.app import run
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.step import Step
from jaxinfer.train import chunkwise, chunkwise_cache, chunkwise_sampling, lm, loop, metrics
from jaxinfer.train.chunkwise import Chunkwise
from jaxinfer.train.chunkwise_sampling import Draw, Sampling
from jaxinfer.train.data import pack
from tests import compiling

LENGTH, CHUNK = 18, 5  # four chunks, the last of them of three tokens
# A window that ends within a chunk and one layer that sees everything, three documents in two rows, heads in groups.
DENSE = {"windows": (7, None), "tie_embeddings": True}
FAMILIES = {
    "dense": DENSE,
    "experts": {"num_experts": 3, "experts_per_token": 2, "expert_size": 12, "num_layers": 1},
    "every head its own": {"num_kv_heads": 4},
    "norms and caps": {"sandwich_norms": True, "attention_softcap": 4.0, "final_softcap": 8.0, "norm_offset": 1.0},
    "qwen": {"qkv_bias": True, "qk_norm": True, "position": "learned"},
    "alibi": {"position": "alibi", "windows": (None, 4)},
    "t5": {"position": "t5"},
}


def model(dtype="float64", **changes):
    """A Step and params in which every weight matters."""
    config = {
        "vocab_size": 24, "hidden_size": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
        "mlp_size": 12, "max_length": 64, **changes,
    }  # fmt: skip
    step = Step(ModelConfig(**config), dtype=dtype)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(step.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.5, x.shape), dtype), shapes)
    return step, params


def packed(length=LENGTH):
    rng = np.random.default_rng(1)
    windows = rng.integers(1, 24, (2, length + 1))
    windows[0, 8], windows[1, 11] = 0, 0
    return pack(windows) | {"counted": rng.random((2, length)) < 0.8}


def mean_loss(step, params, batch):
    """The oracle: the loss of the sequence in one piece, with the attention that the model has without a cache."""
    losses = lm.token_losses(step, params, batch)
    return jnp.sum(jnp.where(batch["counted"], losses, 0.0)) / batch["counted"].sum()


def whole(step):
    """The oracle's value and gradients."""
    return jax.jit(jax.value_and_grad(functools.partial(mean_loss, step)))


def distance(found, wanted):
    """The largest relative error over leaves."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def norm_distance(found, wanted):
    """The relative error of all leaves together."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, found, wanted)) / optax.tree.norm(wanted))


class Toy:
    """The dense model in float64: its exact gradient, and that by chunks for factors that are given, compiled once."""

    def __init__(self):
        with jax.enable_x64(True):
            self.step, self.params = model(**DENSE)
            objective = Chunkwise(self.step, CHUNK, sampling=Sampling(2), rows=3, panel=4)
            self.tokens = chunkwise.cut(packed(), CHUNK, 4)
            self.run = jax.jit(functools.partial(chunkwise.value_and_grad, objective))
            self.loss, self.exact = whole(self.step)(self.params, packed())

    def grads(self, mask, loss, relay):
        """(loss and metrics, gradients) of the chosen chunks with these factors."""
        draw = Draw(jnp.asarray(mask, bool), jnp.asarray(loss, float), jnp.asarray(relay, float))
        return self.run(self.params, None, self.tokens, draw)

    def mean(self, probabilities, factors):
        """The expectation of the gradients over `probabilities(mask)`, with `factors(mask) -> (loss, relay)`."""
        total = jax.tree.map(jnp.zeros_like, self.exact)
        for mask in itertools.product((0, 1), repeat=self.tokens.chunks):
            if p := probabilities(mask):
                grads = self.grads(mask, *factors(mask))[1]
                total = jax.tree.map(lambda sum, g: sum + p * g, total, grads)  # noqa: B023
        return total


@pytest.fixture(scope="module")
def toy():
    return Toy()


def test_seco_is_the_gradient_of_the_whole_sequence(toy):
    with jax.enable_x64(True):
        ones = np.ones(toy.tokens.chunks)
        (loss, metrics), grads = toy.grads(ones, ones, ones)
        assert abs(loss - toy.loss) < 1e-12
        assert distance(grads, toy.exact) < 1e-12
        assert metrics["weight"] == packed()["counted"].sum() and metrics["chunks"] == 4
        # The planted bug: what later chunks send to a chunk's keys and values is dropped.
        assert norm_distance(toy.grads(ones, ones, 0 * ones)[1], toy.exact) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float64(family):
    with jax.enable_x64(True):
        step, params = model(**FAMILIES[family])
        value, exact = whole(step)(params, packed())
        objective = Chunkwise(step, CHUNK, rows=3, panel=4)
        (loss, _), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, packed(), None)
        assert abs(loss - value) < 1e-12 and distance(grads, exact) < 1e-12


@pytest.mark.parametrize("chunk, family", [(4, "dense"), (99, "dense"), (7, "experts")])
@pytest.mark.slow
def test_float32_and_the_loss_alone(chunk, family):
    step, params = model("float32", **FAMILIES[family])
    value, exact = whole(step)(params, packed())
    objective = Chunkwise(step, chunk)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, packed(), None)
    assert abs(loss - value) < 1e-5 and distance(grads, exact) < 1e-5
    alone, told = jax.jit(objective)(params, packed(), None)
    assert abs(alone - value) < 1e-5 and told == metrics


def bernoulli(p):
    return lambda mask: np.prod([p if b else 1 - p for b in mask])


def adaptive_factors(mask, budget=2, least=0.25):
    """(probability of the mask, each chunk's probability), from the last chunk to the first, by hand."""
    used, chance, each = 0, 1.0, np.zeros(len(mask))
    for i in reversed(range(len(mask))):
        each[i] = min(max((budget - used) / (i + 1), least), 1)
        chance *= each[i] if mask[i] else 1 - each[i]
        used += mask[i]
    return chance, each


def test_the_mean_over_all_draws_is_the_gradient(toy):
    with jax.enable_x64(True):
        twice = lambda mask: (2.0 * np.array(mask),) * 2  # noqa: E731
        assert distance(toy.mean(bernoulli(0.5), twice), toy.exact) < 1e-12
        by_hand = lambda mask: (np.array(mask) / adaptive_factors(mask)[1],) * 2  # noqa: E731
        assert distance(toy.mean(lambda mask: adaptive_factors(mask)[0], by_hand), toy.exact) < 1e-12
        # Planted bugs: only one of the two is made up for, as in the published codes.
        for loss, relay in ((2.0, 1.0), (1.0, 2.0)):
            wrong = toy.mean(bernoulli(0.5), lambda m: (loss * np.array(m), relay * np.array(m)))  # noqa: B023
            assert norm_distance(wrong, toy.exact) > 0.05


def test_the_bias_of_the_papers_fixed_number_of_chunks_is_as_documented(toy):
    """The figures that chunkwise_sampling.py quotes."""
    fixed = lambda mask: (sum(mask) == 2) / 6  # noqa: E731
    with jax.enable_x64(True):
        for compensate, (loss, relay) in {"both": (2, 2), "loss": (2, 1), "relay": (1, 2)}.items():
            mean = toy.mean(fixed, lambda m: (loss * np.array(m, float), relay * np.array(m, float)))  # noqa: B023
            assert norm_distance(mean, toy.exact) == pytest.approx(chunkwise_sampling.FIXED_BIAS[compensate], abs=0.005)
            assert Sampling(2, "fixed", compensate=compensate).biased(4)


def test_draws_have_the_laws_of_their_kinds():
    keys = jax.random.split(jax.random.key(0), 4000)

    def of(**settings):
        return jax.jit(jax.vmap(lambda key: Sampling(2, **settings).draw(key, 4)))(keys)

    counts = np.asarray(of().chosen.sum(1))
    assert abs(counts.mean() - 2) < 0.06 and abs(counts.std() - 1) < 0.06
    draws = of(kind="adaptive", min_probability=0.25)
    masks, times = np.unique(np.asarray(draws.chosen), axis=0, return_counts=True)
    law = {mask: adaptive_factors(mask)[0] for mask in itertools.product((0, 1), repeat=4)}
    for mask, count in zip(masks.astype(int), times, strict=True):
        assert abs(count / len(keys) - law[tuple(mask)]) < 0.03
    first = np.asarray(draws.chosen[0]).astype(int)
    np.testing.assert_allclose(draws.loss[0], first / adaptive_factors(first)[1], rtol=1e-6)
    assert np.asarray(draws.chosen.sum(1)).std() < 0.6
    draws = of(kind="fixed")
    assert (np.asarray(draws.chosen.sum(1)) == 2).all() and abs(np.asarray(draws.chosen).mean(0) - 0.5).max() < 0.04
    np.testing.assert_array_equal(draws.relay, 2.0 * draws.chosen)
    clipped = of(kind="adaptive", max_compensation=2.0)
    assert clipped.loss.max() == 2 and Sampling(2, "adaptive", max_compensation=2.0).biased(4)
    assert not Sampling(2).biased(4) and not Sampling(4, "fixed").biased(4)
    whole = Sampling(4, "adaptive").draw(keys[0], 4)
    jax.tree.map(np.testing.assert_array_equal, whole, chunkwise_sampling.every(4))


@pytest.mark.slow
def test_adapters_over_quantized_weights_are_trained_alone():
    step, params = model("float32", **DENSE)
    base = quant.apply(params, [(r".*/mlp/.*", quant.Int8())])
    adapted = quant.adapt(base, [(r".*/attention/[qv]", quant.Lora(rank=2))], jax.random.key(0))
    trained, frozen = quant.split(adapted)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    reference = jax.jit(jax.grad(lambda t, f, b: mean_loss(step, quant.join(t, f), b)))
    objective = Chunkwise(step, CHUNK, rows=8, panel=8)
    run = jax.jit(jax.grad(lambda t, f, b: objective(t, b, None, f)[0]))
    found = run(trained, frozen, packed())
    assert distance(found, reference(trained, frozen, packed())) < 1e-5
    assert jax.tree.structure(found) == jax.tree.structure(trained)


def temporary(objective, step, params, length):
    """Bytes that XLA needs besides arguments and results, and those of keys, values and their gradients."""
    batch = {n: jax.ShapeDtypeStruct((1, length), jnp.int32) for n in ("ids", "targets", "positions", "segments")}
    run = jax.jit(lambda params, batch: jax.grad(objective, has_aux=True)(params, batch, None)[0])
    c = step.config
    cache = 4 * c.num_layers * c.num_kv_heads * c.head_dim * length * 4
    compiled = run.lower(params, batch).compile(compiler_options=compiling.DEFAULTS)
    return compiled.memory_analysis().temp_size_in_bytes, cache


def clearing(spec, kept, cotangents):
    """The planted bug: a chunk's slots in the gradients are cleared once read, and XLA copies the whole buffers."""
    *found, relay_k, relay_v, _, _, _ = chunkwise_cache._attention_backward(spec, kept, cotangents)
    start = (0, 0, kept[4].at, 0)
    cleared = (
        jax.lax.dynamic_update_slice(x, jnp.zeros_like(d), start)
        for x, d in zip((relay_k, relay_v), found[1:3], strict=True)
    )
    return *found, *cleared, None, None, None


@pytest.mark.slow
@pytest.mark.parametrize("clears", [False, True])
def test_memory_is_that_of_one_chunk_beside_keys_values_and_their_gradients(monkeypatch, clears):
    if clears:
        monkeypatch.setattr(chunkwise_cache._attention, "bwd", clearing)
    step, params = model("float32", num_layers=2, hidden_size=64, mlp_size=256, head_dim=16)
    objective = Chunkwise(step, 64, panel=128)
    (short, short_cache), (long, long_cache) = (temporary(objective, step, params, n) for n in (1024, 4096))
    growth = (long - long_cache) - (short - short_cache)
    assert (growth > long_cache / 32) == clears  # one buffer of one layer is an eighth


RUN = loop.LoopConfig(steps=5, save_every=2, curve=False)


def recipe(**changes):
    """SpaCO in two microbatches, AdamW."""
    step, params = model("float32", num_layers=1)

    def data(step):
        batch = pack(np.random.default_rng((3, step)).integers(1, 24, (2, 13)))
        return lm.split_batch(batch, 2)

    objective = Chunkwise(step, 4, Sampling(1))
    fields = {"objective": objective, "data": data, "optimizer": optax.adamw(1e-2), "accumulate": 2, **changes}
    which = loop.Recipe(**fields)
    return which, loop.init_state(params, which, jax.random.key(2))


@pytest.mark.slow
def test_a_run_killed_with_sigkill_resumes_to_the_same_bits(tmp_path):
    script = textwrap.dedent("""
        import importlib.util, os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_default_matmul_precision", "highest")
        spec = importlib.util.spec_from_file_location("chunks", sys.argv[1])
        chunks = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(chunks)
        undisturbed, _ = chunks.recipe()
        def data(step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return undisturbed.data(step)
        which, state = chunks.recipe(data=data)
        chunks.loop.train(which, state, chunks.RUN, sys.argv[2])
    """)
    ended = subprocess.run([sys.executable, "-c", script, __file__, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert loop.Checkpoints(tmp_path / "checkpoints").latest() == 2
    which, state = recipe()
    resumed = loop.train(which, state, RUN, tmp_path)
    which, state = recipe()
    undisturbed = loop.train(which, state, RUN, tmp_path / "other")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, undisturbed.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, undisturbed.opt_state)
    assert int(resumed.step) == 5 and os.path.exists(tmp_path / "metrics.jsonl")


@pytest.mark.slow
def test_rows_and_heads_may_be_sharded():
    step, params = model("float32", **DENSE)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))

    def place(path, leaf):
        spec = PartitionSpec(None, "tensor") if path[-1].key in ("q", "k", "v") else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    run = jax.jit(jax.grad(Chunkwise(step, CHUNK, rows=4, panel=8), has_aux=True))
    alone, _ = run(params, packed(), None)
    batch = jax.device_put(packed(), NamedSharding(mesh, PartitionSpec("data")))
    sharded, _ = run(jax.tree_util.tree_map_with_path(place, params), batch, None)
    assert distance(sharded, alone) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--budget", "2"], ["--sampling", "all", "--rank", "2"]])
def test_the_command_line_trains_and_writes(tiny_model, tmp_path, capsys, more):
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parent.parent / "LICENSE").read_text())
    told = ["--target", str(tiny_model), "--data", str(text), "--output", str(tmp_path / "out"), "--steps", "4"]
    command = ["train", "long", *told, "--length", "640", "--chunk", "64", *more]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chunks"] == 10 and found["budget"] == (2 if "--budget" in more else None)
    assert found["bits_per_byte"] < found["bits_per_byte_before"]
    written = "adapter_model.safetensors" if "--rank" in more else "model.safetensors"
    assert (tmp_path / "out" / written).is_file()
    assert metrics.read(tmp_path / "out" / "train" / "metrics.jsonl")[0]["tokens"] == 640
    assert run([*command, "--sampling", "some"]) == 2 and "accepted: bernoulli" in capsys.readouterr().err


def test_errors_name_the_field():
    step, params = model("float32", num_layers=1)
    with pytest.raises(ConfigError, match="chunk: got 0"):
        Chunkwise(step, 0)
    for settings, told in {
        "budget: got 0": {"budget": 0},
        "sampling: got 'top', accepts bernoulli, adaptive, fixed": {"kind": "top"},
        "min_probability: got 0": {"min_probability": 0.0},
        "compensate: got 'loss' for bernoulli": {"compensate": "loss"},
        "max_compensation: got 0.5": {"max_compensation": 0.5},
    }.items():
        with pytest.raises(ConfigError, match=settings):
            Sampling(**told)
    with pytest.raises(InputError, match="batch: got no segments"):
        Chunkwise(step)(params, {k: v for k, v in packed().items() if k != "segments"}, None)
