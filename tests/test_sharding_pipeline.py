"""Pipelines on virtual devices: losses, gradients and greedy tokens are those of one device, and 1F1B holds little."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxinfer import decode, quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.sharding import pipeline_decode, pipeline_report
from jaxinfer.sharding import stages as cut
from jaxinfer.sharding.collectives import collectives
from jaxinfer.sharding.pipeline_decode import Pipeline
from jaxinfer.sharding.pipeline_schedule import Table
from jaxinfer.sharding.pipeline_train import PipelineLoss
from jaxinfer.sharding.rules import REPLICATED, TENSOR
from jaxinfer.sharding.stages import Stages
from jaxinfer.train import lm
from jaxinfer.train.loop import Recipe, init_state, make_train_step

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48, max_length=32,
    windows=(4, None, 4), tie_embeddings=True,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    CONFIG, num_layers=4, windows=(), num_experts=4, experts_per_token=2, expert_size=16, tie_embeddings=False,
    position="learned",
)  # fmt: skip
STAGES = Stages((2, 1))
PROMPTS = [np.random.default_rng(i).integers(0, 48, n).tolist() for i, n in enumerate([7, 1, 12, 5, 3, 9, 2])]
NEW = [5, 6, 3, 4, 8, 2, 7]


def mesh(**axes):
    count = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def model(config):
    step = Step(config)
    return step, jax.tree.map(lambda w: w * 4 if w.ndim > 1 else w, step.init(jax.random.key(0)))


def placed(step, params, devices, stages, rules=TENSOR):
    return jax.device_put(cut.split(params, stages), cut.shardings(step, devices, rules, stages))


def batch_of(rows, length, seed=0):
    """Rows of two documents each."""
    ids, targets = np.random.default_rng(seed).integers(0, 48, (2, rows, length)).astype(np.int32)
    segments = np.tile((np.arange(length) >= 5).astype(np.int32), (rows, 1))
    positions = np.tile(np.where(np.arange(length) >= 5, np.arange(length) - 5, np.arange(length)), (rows, 1))
    return {"ids": ids, "targets": targets, "segments": segments, "positions": positions.astype(np.int32)}


def assert_same_gradients(found, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9, err_msg=str(path))


def by_one_device(step, params, batch):
    objective = lm.NextToken(step)
    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch, jax.random.key(0))


@pytest.fixture(scope="module")
def dense():
    step, params = model(CONFIG)
    devices, batch = mesh(data=2, stage=2, tensor=2), batch_of(8, 8)
    return step, params, devices, batch, placed(step, params, devices, STAGES), by_one_device(step, params, batch)


def run_loss(loss, params, batch):
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, jax.random.key(0))
    return value, metrics, cut.merge(grads, loss.stages)


def check_loss(dense, schedule, bubble):
    step, _, devices, batch, staged, ((expected, _), expected_grads) = dense
    loss = PipelineLoss(step, devices, STAGES, 4, schedule, data="data")
    value, metrics, grads = run_loss(loss, staged, batch)
    assert abs(float(value) - float(expected)) < 1e-5
    assert_same_gradients(grads, expected_grads)
    assert float(metrics["bubble"]) == pytest.approx(bubble, abs=1e-6)
    assert float(metrics["ticks"]) == loss.table.ticks and float(metrics["weight"]) == 64


def test_loss_and_gradients_are_those_of_one_device(dense):
    """Uneven stages, windows of two kinds, tied embeddings, packed documents, with data and tensor axes."""
    check_loss(dense, "1f1b", bubble=(2 - 1) / (4 + 2 - 1))


@pytest.mark.slow
@pytest.mark.parametrize("schedule,bubble", [("gpipe", 1 / 5), ("1f1b-together", 2 / 6)])
def test_other_schedules_give_the_same(dense, schedule, bubble):
    check_loss(dense, schedule, bubble)


@pytest.mark.slow
def test_a_slot_too_few_is_caught(dense, monkeypatch):
    """Negative control: with one slot fewer than the table needs an input is overwritten, and gradients are wrong."""
    monkeypatch.setattr(Table, "held", 1)
    with pytest.raises(AssertionError):
        check_loss(dense, "1f1b", bubble=1 / 5)


@pytest.mark.slow
def test_four_stages_of_experts_train_as_one_device_does():
    """Two updates with momentum by the training loop's step; four stages, learned positions and mixtures of experts."""
    step, params = model(EXPERTS)
    devices, stages = mesh(data=2, stage=4), Stages.even(4, 4)
    batches = [batch_of(8, 8, seed) for seed in range(2)]

    def trained(objective, params):
        recipe = Recipe(objective, batches.__getitem__, optax.sgd(0.1, momentum=0.9))
        state, update = init_state(params, recipe, jax.random.key(0)), jax.jit(make_train_step(recipe))
        for batch in batches:
            state, metrics = update(state, batch)
        return state.params, float(metrics["loss"])

    expected, last = trained(lm.NextToken(step), params)
    loss = PipelineLoss(step, devices, stages, 4, data="data")
    found, value = trained(loss, placed(step, params, devices, stages, REPLICATED))
    assert abs(value - last) < 1e-5
    for a, b in zip(jax.tree.leaves(cut.merge(found, stages)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def memory_program(schedule, microbatches, rows=2, length=32):
    """The traced program of two stages, and the shape of one micro-batch's input."""
    config = dataclasses.replace(CONFIG, num_layers=2, windows=(), vocab_size=16)
    step, params = model(config)
    devices, stages = mesh(stage=2), Stages((1, 1))
    batch = {k: v % 16 for k, v in batch_of(rows * microbatches, length).items()}
    loss = PipelineLoss(step, devices, stages, microbatches, schedule)
    staged = placed(step, params, devices, stages, REPLICATED)
    return jax.jit(loss.value_and_grad).trace(staged, batch), (rows, length, config.hidden_size)


def test_one_f_one_b_keeps_as_many_inputs_as_stages():
    """The stash of the traced program over the number of micro-batches."""

    def stash(schedule, microbatches):
        program, shape = memory_program(schedule, microbatches)
        text, each = str(program.jaxpr), ",".join(map(str, shape))
        return max(n for n in (2, 4, 16) if f"f32[{n},{each}]" in text)

    assert [stash("1f1b", m) for m in (4, 16)] == [2, 2]
    assert [stash("gpipe", m) for m in (4, 16)] == [4, 16]


@pytest.mark.slow
def test_memory_of_one_f_one_b_does_not_grow_with_micro_batches():
    def temporary(schedule, microbatches):
        program, shape = memory_program(schedule, microbatches)
        compiled = program.lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * np.prod(shape))

    assert temporary("1f1b", 16) - temporary("1f1b", 4) < 1
    assert temporary("gpipe", 16) - temporary("gpipe", 4) >= 12


def test_activations_travel_by_permutes_and_gradients_are_summed_once(dense):
    step, _, devices, batch, staged, _ = dense
    config = dataclasses.replace(CONFIG, num_layers=2, windows=())
    step, params = model(config)
    devices, stages = mesh(data=2, stage=2), Stages((1, 1))
    staged = placed(step, params, devices, stages, REPLICATED)
    program = jax.jit(PipelineLoss(step, devices, stages, 4, data="data").value_and_grad).lower(staged, batch)
    found = collectives(program.compile())
    ticks, activation = 2 * (4 + 2 - 1), 1 * 8 * config.hidden_size * 4
    permutes = [one for one in found if one.kind == "collective-permute"]
    assert {one.nbytes for one in permutes} == {activation}
    assert sum(one.times for one in permutes) == 2 * ticks  # one each way a tick
    assert {one.kind for one in found} == {"collective-permute", "all-reduce"}
    assert all(one.times == 1 for one in found if one.kind == "all-reduce")


# Decoding.


@pytest.fixture(scope="module")
def plain():
    """Greedy tokens of one device, in one batch."""
    step, params = model(CONFIG)
    return step, params, expected_tokens(step, params)


def expected_tokens(step, params):
    tokens = np.zeros((len(PROMPTS), 12), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.asarray([len(p) for p in PROMPTS], np.int32)
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    found = generate(step, params, tokens, lengths, config=decode.Config(max_tokens=8), key=jax.random.key(0))
    return [row[:n].tolist() for row, n in zip(np.asarray(found.tokens), NEW, strict=True)]


def served_tokens(served):
    return [row[:n].tolist() for row, n in zip(served.tokens, served.lengths, strict=True)]


@pytest.fixture(scope="module")
def pipeline(plain):
    step, params, _ = plain
    devices = mesh(stage=2, tensor=2)
    return Pipeline(step, devices, STAGES, rows=2, chunk=4, heads="tensor"), placed(step, params, devices, STAGES)


def test_pipelined_greedy_decoding_is_token_for_token_equal(plain, pipeline, monkeypatch):
    """Uneven stages, a tensor axis, rows that take a second request; and without emptying those rows it is not."""
    served = pipeline_decode.generate(*pipeline, PROMPTS, NEW)
    assert served_tokens(served) == plain[2]
    assert len(PROMPTS) > pipeline[0].rows * pipeline[0].num_groups
    assert served.bubble == pytest.approx(served.table.bubble, abs=1e-9)

    feed = pipeline_decode._feed
    monkeypatch.setattr(
        pipeline_decode, "_feed", lambda *a: dataclasses.replace(f := feed(*a), fresh=np.zeros_like(f.fresh))
    )
    assert served_tokens(pipeline_decode.generate(*pipeline, PROMPTS, NEW)) != plain[2]


@pytest.mark.slow
def test_every_policy_gives_the_same_tokens_and_its_own_bubble(plain, pipeline):
    bubbles = {}
    for policy in ("whole", "chunked"):
        one = dataclasses.replace(pipeline[0], policy=policy)
        served = pipeline_decode.generate(one, pipeline[1], PROMPTS, NEW)
        assert served_tokens(served) == plain[2]
        bubbles[policy] = served.bubble
        assert served.bubble == pytest.approx(served.table.bubble, abs=1e-9)
    rows = pipeline_report.decode_rows(*pipeline, PROMPTS, NEW, policies=("whole", "piggyback"), rounds=1)
    assert [row["bubble"] for row in rows][0] == bubbles["whole"] > rows[1]["bubble"]
    assert rows[0]["ticks"] > rows[1]["ticks"] and all(row["median_s"] > 0 for row in rows)


@pytest.mark.slow
def test_experts_decode_on_four_stages_with_a_data_axis():
    step, params = model(EXPERTS)
    devices, stages = mesh(data=2, stage=4), Stages.even(4, 4)
    one = Pipeline(step, devices, stages, rows=1, chunk=3, data="data")
    served = pipeline_decode.generate(one, placed(step, params, devices, stages, REPLICATED), PROMPTS, NEW)
    assert served_tokens(served) == expected_tokens(step, params)


@pytest.mark.slow
def test_quantized_weights_and_end_tokens(plain):
    """Int8 leaves are stacked like any; an output ends at the first end token."""
    step, params, _ = plain
    params = quant.apply(params, [(".*/(mlp|attention)/.*", quant.Int8())])
    expected = expected_tokens(step, params)
    eos = expected[4][3]
    step, stages, devices = Step(dataclasses.replace(CONFIG, eos=(eos,))), STAGES, mesh(stage=2)
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    staged = jax.device_put(cut.split(params, stages), cut.shardings(step, devices, REPLICATED, stages, params))
    served = pipeline_decode.generate(Pipeline(step, devices, stages, rows=2, chunk=4), staged, PROMPTS, NEW)
    assert served_tokens(served) == expected and served.lengths.tolist() != NEW


@pytest.mark.slow
def test_a_measured_row_is_of_the_program_that_ran():
    config = dataclasses.replace(CONFIG, num_layers=2, windows=())
    step, params = model(config)
    devices, stages = mesh(stage=2), Stages((1, 1))
    loss = PipelineLoss(step, devices, stages, 4)
    staged = placed(step, params, devices, stages, REPLICATED)
    (row,) = pipeline_report.training_rows(loss, staged, batch_of(4, 8), schedules=("1f1b",), rounds=1)
    assert row["ticks"] == 10 and row["bubble"] == pytest.approx(row["bubble_formula"], abs=1e-6)
    assert row["held"] == row["held_formula"] == 2 and row["median_s"] > 0 and row["temp_bytes"] > 0


# Stages.


def test_stages_split_merge_and_place():
    step, params = model(CONFIG)
    staged = cut.split(params, STAGES)
    assert staged["stages"]["slot_1"]["mlp"]["up"].shape == (2, 32, 48)
    assert not staged["stages"]["slot_1"]["mlp"]["up"][1].any()
    back = cut.merge(staged, STAGES)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    found = cut.shardings(step, mesh(stage=2, tensor=2), TENSOR.replace(vocab=("stage", "tensor")), STAGES)
    assert found["stages"]["slot_0"]["attention"]["q"].spec == PartitionSpec("stage", None, "tensor")
    assert found["embedding"].spec == PartitionSpec(("stage", "tensor"), None)
    assert jax.tree.structure(found) == jax.tree.structure(staged)
    assert Stages.even(7, 3) == Stages((3, 2, 2)) and STAGES.layer(1, 1) is None and STAGES.layer(1, 0) == 2


STEP = Step(CONFIG)
BATCH = batch_of(8, 8)
EXPLICIT = jax.sharding.AbstractMesh((2,), ("stage",), axis_types=(AxisType.Explicit,))


def two_stages(microbatches):
    return PipelineLoss(STEP, mesh(stage=2), STAGES, microbatches)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: Stages.even(3, 4), "3 layers cannot be cut into 4 stages; 1 to 3 stages fit"),
        (lambda: Stages((2, 0)), "positive integers"),
        (lambda: PipelineLoss(STEP, mesh(stage=2), Stages((2, 2)), 2), r"\(2, 2\) layers are 4; the model has 3"),
        (lambda: PipelineLoss(STEP, mesh(stage=4), STAGES, 2), "2 stages on 4 parts"),
        (lambda: PipelineLoss(STEP, mesh(pipe=2), STAGES, 2), "mesh axis 'stage'; the mesh has pipe"),
        (lambda: PipelineLoss(STEP, mesh(stage=2), STAGES, 2, data="data"), "'data' is not there"),
        (lambda: PipelineLoss(STEP, mesh(stage=2), STAGES, 2, "zero"), "schedule 'zero'"),
        (lambda: PipelineLoss(STEP, EXPLICIT, STAGES, 2), "AxisType.Auto; stage: Explicit"),
        (lambda: two_stages(3).value_and_grad({}, BATCH), "micro-batches that fit: 1, 2, 4, 8"),
        (lambda: two_stages(2).value_and_grad({}, {"ids": BATCH["ids"]}), "lacks 'positions'"),
        (lambda: two_stages(2).value_and_grad({"w": jnp.ones(3, "int8")}, BATCH), "w is int8"),
        (lambda: Pipeline(STEP, mesh(stage=2, tensor=4), STAGES, heads="tensor"), "num_kv_heads is 2: 4 parts"),
        (lambda: pipeline_decode.generate(Pipeline(STEP, mesh(stage=2), STAGES), {}, [[1], []], 3), "prompt 1"),
        (lambda: pipeline_decode.generate(Pipeline(STEP, mesh(stage=2), STAGES), {}, [[1, 48]], 3), "0 to 47"),
        (lambda: pipeline_decode.generate(Pipeline(STEP, mesh(stage=2), STAGES), {}, [[1]], 0), "0 new tokens"),
        (lambda: cut.shardings(STEP, mesh(stage=2), REPLICATED.replace(mlp="stage"), STAGES), "mlp/.*over 'stage'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises((ConfigError, InputError), match=words):
        call()


def test_layers_that_cannot_share_a_slot_are_refused():
    config = dataclasses.replace(EXPERTS, dense_layers=(0,))
    abstract = jax.eval_shape(functools.partial(Step(config).init, jax.random.key(0)))
    with pytest.raises(ConfigError, match="layers 0 and 2 share a slot.*differ"):
        cut.split(abstract, Stages((2, 2)))
