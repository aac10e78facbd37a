"""The planner's bytes and messages against compiled programs, and what it picks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cli, quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.sharding import planner
from jaxinfer.sharding.collectives import collectives, sent
from jaxinfer.sharding.mesh import make_mesh, parse
from jaxinfer.sharding.planner import CHIPS, Chip, Job, pick, plans, predict
from jaxinfer.sharding.strategies import sharded
from jaxinfer.train.lm import NextToken

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, mlp_size=48, max_length=64
)
MOE = dataclasses.replace(CONFIG, num_experts=8, experts_per_token=2, expert_size=16)
LARGE = ModelConfig(  # as wide as Llama-3-70B, a tenth as deep
    vocab_size=128256, hidden_size=8192, num_layers=8, num_heads=64, num_kv_heads=8, head_dim=128, mlp_size=28672,
    max_length=8192,
)  # fmt: skip


def compiled_step(config, text, job):
    """The job's step under the mesh, compiled from shapes: a forward to the logits, or loss and gradients."""
    step = sharded(Step(config), make_mesh(parse(text), config, batch=job.batch))
    params = jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s),
        jax.eval_shape(step.step.init, jax.random.key(0)),
        step.shardings(),
    )
    ids = jnp.zeros((job.batch, job.tokens), jnp.int32)
    if job.kind == "train":
        batch = {"ids": ids, "targets": ids, "segments": ids, "positions": ids}
        run = jax.jit(jax.value_and_grad(NextToken(step), has_aux=True), out_shardings=((None, None), step.shardings()))
        return run.lower(params, batch, None).compile()
    make = jax.jit(lambda: step.new_cache(job.batch, job.capacity)).lower().compile()
    cache = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        jax.eval_shape(lambda: step.new_cache(job.batch, job.capacity)),
        make.output_shardings,
    )

    def forward(params, ids, positions, cache):
        return step.head(params, step(params, ids, positions, cache)[0].hidden)

    return jax.jit(forward).lower(params, ids, ids, cache).compile()


def check(config, text, job, *, tolerance=0.01):
    """Predicted against compiled: bytes sent, bytes of arguments, and work space within a factor.

    (XLA for CPUs multiplies every row by every expert and masks the rest: that space is not of the strategy.)
    """
    compiled, plan = compiled_step(config, text, job), predict(Step(config), parse(text), job)
    assert not any(one.unbounded for one in collectives(compiled))
    assert sent(compiled) == pytest.approx(plan.sent, rel=tolerance), (plan.sends, collectives(compiled))
    memory = compiled.memory_analysis()
    assert memory is not None
    held = plan.weights + plan.cache
    inputs = 4 * 4 * job.batch * job.tokens  # ids and the like, whole or split
    assert held <= memory.argument_size_in_bytes <= held + inputs
    if config.num_experts:
        return
    assert 0.5 < (plan.work + (plan.optimizer / 3)) / (memory.temp_size_in_bytes + memory.output_size_in_bytes) < 4


def test_a_decoding_step_is_as_predicted():
    check(CONFIG, "data=2,tensor=4", Job("decode", 8, 1, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,text,kind",
    [
        (CONFIG, "tensor=4", "prefill"),
        (CONFIG, "fsdp=8", "prefill"),
        (CONFIG, "data=2,context=4", "prefill"),
        (CONFIG, "context=2,tensor=4", "decode"),
        (MOE, "data=2,tensor=4", "decode"),
        (CONFIG, "data=8", "train"),
        (CONFIG, "data=2,tensor=4", "train"),
        (CONFIG, "data=2,context=4", "train"),
    ],
)
def test_steps_are_as_predicted(config, text, kind):
    jobs = {"decode": Job("decode", 8, 1, 32), "prefill": Job("prefill", 8, 16, 32), "train": Job("train", 8, 16)}
    check(config, text, jobs[kind])


@pytest.mark.slow
def test_a_planted_collective_is_caught(monkeypatch):
    """A planner that forgets the embedding's sum, and one that counts half of each sum."""
    monkeypatch.setattr(planner, "_all_reduce", lambda count, parts: count * (parts - 1) / parts)
    with pytest.raises(AssertionError):
        check(CONFIG, "data=2,tensor=4", Job("decode", 8, 1, 32))


def test_large_models_are_planned_from_shapes_alone():
    step = Step(LARGE, dtype="bfloat16")
    shapes = jax.eval_shape(step.init, jax.random.key(0))
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, "bfloat16"), shapes)
    job, chip = Job("decode", 64, 1, 8192), dataclasses.replace(CHIPS["h200"], memory=14.1e9)
    found = plans(step, 8, job, chip, params, width=2)
    best = pick(found, chip)
    assert str(best) == "tensor=8"
    total = sum(w.size for w in jax.tree.leaves(params)) * 2
    assert best.weights == pytest.approx(total / 8, rel=1e-3)
    assert best.cache == pytest.approx(64 * 8192 * 8 * 2 * 8 * 128 * 2 / 8, rel=0.01)  # positions beside
    quantized = jax.eval_shape(lambda p: quant.apply(p, [(".*/mlp/.*", quant.Int8())]), params)
    assert predict(step, {"tensor": 8}, job, quantized).weights < 0.75 * best.weights
    fits = [plan.fits(chip.memory) for plan in found]
    assert fits == sorted(fits, reverse=True) and not all(fits)
    small = Chip("small", 2.4e9, 1e12, 1e12, 1e11)
    with pytest.raises(InputError, match=r"no strategy fits .* the smallest, .* takes .* accepted: more devices"):
        pick(plans(step, 8, job, small, params), small)


def test_jobs_and_meshes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="job kind 'serve' is unknown; accepted: decode, prefill, train"):
        Job("serve", 8, 1, 8)
    with pytest.raises(ConfigError, match="a capacity of at least the tokens"):
        Job("decode", 8, 4, 2)
    with pytest.raises(ConfigError, match="num_kv_heads is 4.*would fit: tensor=1|2|4"):
        predict(Step(CONFIG), {"tensor": 8}, Job("decode", 8, 1, 32))
    with pytest.raises(ConfigError, match="7 devices: no mesh divides .*would fit: 6"):
        plans(Step(CONFIG), 7, Job("decode", 6, 1, 32), CHIPS["h200"], axes=("data", "tensor"))


def test_the_command_prints_and_picks(capsys, tiny_model):
    assert (
        cli.main(["plan", str(tiny_model), "--devices", "4", "--batch-size", "8", "--max-length", "128", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    meshes = [plan["mesh"] for plan in report["plans"]]
    assert report["picked"] == meshes[0] and "data=2,tensor=2" in meshes and "tensor=4" not in meshes
    assert np.isfinite([plan["predicted_seconds"] for plan in report["plans"]]).all()
    assert cli.main(["plan", str(tiny_model), "--train", "--batch-size", "8"]) == 0
    shown = capsys.readouterr()
    assert "predictions, not measurements" in shown.out and "take --mesh" in shown.err
    assert cli.main(["plan", str(tiny_model), "--memory", "10KB"]) == 2
    assert "no strategy fits" in capsys.readouterr().err
    assert cli.main(["plan", str(tiny_model), "--chip", "abacus"]) == 2
    assert "--chip: got 'abacus'; accepted: h200, v5p" in capsys.readouterr().err
