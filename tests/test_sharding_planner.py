"""The planner's bytes and messages against compiled programs, and what it picks."""

import ast
import dataclasses
import json
import re
from pathlib import Path

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
from jaxinfer.sharding.strategies import BETWEEN, Sharded, sharded
from jaxinfer.train.lm import NextToken

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, mlp_size=48, max_length=64
)
MOE = dataclasses.replace(CONFIG, num_experts=8, experts_per_token=2, expert_size=16)
ONE = dataclasses.replace(CONFIG, num_layers=1)
TIED = dataclasses.replace(ONE, tie_embeddings=True, qk_norm=True)
LARGE = ModelConfig(  # as wide as Llama-3-70B, a tenth as deep
    vocab_size=128256, hidden_size=8192, num_layers=8, num_heads=64, num_kv_heads=8, head_dim=128, mlp_size=28672,
    max_length=8192,
)  # fmt: skip


def compiled_step(config, text, job):
    """The job's step under the mesh, compiled from shapes: a forward to the logits, or loss and gradients."""
    order, _, axes = text.rpartition(":")
    step = sharded(Step(config), make_mesh(parse(axes), config, batch=job.batch), sequence=order == "sequence")
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


def plan_of(config, text, job, **options):
    order, _, axes = text.rpartition(":")
    return predict(Step(config), parse(axes), job, sequence=order == "sequence", **options)


def check(config, text, job, *, compiled=None, tolerance=0.01):
    """Predicted against compiled: bytes sent, bytes of arguments, and work space within a factor.

    (XLA for CPUs multiplies every row by every expert and masks the rest: that space is not of the strategy. And sums
    of four bytes over all devices, the loss and how many rounds the experts take, are no part of a plan.)
    """
    compiled = compiled or compiled_step(config, text, job)
    plan, found = plan_of(config, text, job, scatters=False), collectives(compiled)
    assert not any(one.unbounded for one in found)
    scalars = sum(one.sent for one in found if one.shapes == ((),))
    assert scalars <= 8 * (1 + 2 * config.num_layers)
    assert sent(found, conditional=False) - scalars == pytest.approx(plan.sent, rel=tolerance), (plan.sends, found)
    assert sent(found) - scalars == pytest.approx(plan.sent + plan.uneven, rel=tolerance)
    memory = compiled.memory_analysis()
    assert memory is not None
    held = plan.weights + plan.cache
    inputs = 4 * 4 * job.batch * job.tokens  # ids and the like, whole or split
    assert held <= memory.argument_size_in_bytes <= held + inputs
    if config.num_experts:
        return
    room, used = plan.work + plan.optimizer / 3, memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert room < 4 * used
    assert used < 2 * (room + dict(plan.sends).get("weights", 0))  # all are gathered before the first is used


JOBS = {"decode": Job("decode", 8, 1, 32), "prefill": Job("prefill", 8, 16, 32), "train": Job("train", 8, 16)}


@pytest.fixture(scope="module")
def decoding():
    return compiled_step(CONFIG, "data=2,tensor=4", JOBS["decode"])


def test_a_decoding_step_is_as_predicted(decoding):
    check(CONFIG, "data=2,tensor=4", JOBS["decode"], compiled=decoding)


def test_a_training_step_with_tokens_split_is_as_predicted():
    check(ONE, "sequence:data=2,tensor=4", JOBS["train"])


def test_experts_are_as_predicted_for_the_most_even_and_the_most_uneven_routing():
    config = dataclasses.replace(MOE, num_layers=1)
    assert plan_of(config, "data=2,expert=4", JOBS["decode"]).uneven
    check(config, "data=2,expert=4", JOBS["decode"])


# Those of scripts/bench_sharding.py, which a test below compares, and products of them.
MESHES = ("data=8", "fsdp=8", "data=2,tensor=4", "sequence:data=2,tensor=4", "fsdp=2,tensor=4", "data=2,context=4")
MIXTURES = ("data=8", "fsdp=8", "expert=8", "data=2,expert=4", "data=2,tensor=4", "sequence:data=2,tensor=4")
PRODUCTS = [
    (CONFIG, "tensor=4", "prefill"),
    (CONFIG, "fsdp=8", "prefill"),
    (CONFIG, "data=2,context=4", "prefill"),
    (CONFIG, "sequence:data=2,tensor=4", "prefill"),
    (CONFIG, "context=2,tensor=4", "decode"),
    (CONFIG, "data=2,fsdp=4", "train"),
    (CONFIG, "context=2,tensor=4", "train"),
    (CONFIG, "sequence:fsdp=2,tensor=4", "train"),
    (MOE, "expert=2,tensor=4", "train"),
    (TIED, "data=2,tensor=4", "train"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decode", "train"])
@pytest.mark.parametrize("model,text", [*(("dense", m) for m in MESHES), *(("mixture", m) for m in MIXTURES)])
def test_every_strategy_sends_what_is_predicted(model, text, kind):
    check({"dense": CONFIG, "mixture": dataclasses.replace(MOE, num_layers=1)}[model], text, JOBS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("config,text,kind", PRODUCTS)
def test_products_of_strategies_send_what_is_predicted(config, text, kind):
    check(dataclasses.replace(config, num_layers=1), text, JOBS[kind])


def test_the_benchmarks_meshes_are_all_compared():
    text = (Path(__file__).parent.parent / "scripts" / "bench_sharding.py").read_text()
    for name, compared in (("MESHES", MESHES), ("MIXTURES", MIXTURES)):
        listed = re.search(rf"^{name} = (\(.*?\))(?:  # fmt: skip)?$", text, re.M | re.S)
        assert listed and set(ast.literal_eval(listed.group(1))) == {"", *compared}


def test_a_wrong_formula_is_caught(decoding, monkeypatch):
    """Planted bug: a planner that counts half of each sum."""
    monkeypatch.setattr(planner, "_tensor", lambda s, training: 4 * s.stream)
    with pytest.raises(AssertionError):
        check(CONFIG, "data=2,tensor=4", JOBS["decode"], compiled=decoding)


@pytest.mark.slow
def test_a_program_that_sends_more_is_caught(monkeypatch):
    """Planted bug: the border of a block that names its outer side alone."""
    monkeypatch.setattr(Sharded, "_leave", lambda self, x: self.split(x, BETWEEN))
    with pytest.raises(AssertionError):
        check(CONFIG, "sequence:data=2,tensor=4", JOBS["train"])


def test_compilers_that_scatter_send_less():
    """The same sums where they end split: half; whole ones are as they were."""
    sends = {flag: dict(plan_of(CONFIG, "fsdp=8", JOBS["train"], scatters=flag).sends) for flag in (True, False)}
    assert sends[False]["gradients"] == 2 * sends[True]["gradients"]
    assert sends[False]["weights"] == sends[True]["weights"]
    split, whole = (plan_of(CONFIG, f"{order}tensor=4", JOBS["train"]) for order in ("sequence:", ""))
    # Scatter and gather are an all-reduce; two gathers more, before the head and, backward, before the embedding,
    # stand for two sums that were whole; and norms of split tokens sum their gradients.
    assert dict(split.sends)["tensor"] == dict(whole.sends)["tensor"]
    assert dict(split.sends)["gradients"] == 5 * 2 * 32 * 4 * 3 / 4
    decode = [plan_of(CONFIG, "data=2,tensor=4", JOBS["decode"], scatters=flag).sent for flag in (True, False)]
    assert decode[0] == decode[1]


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
