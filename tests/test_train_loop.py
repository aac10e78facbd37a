"""The training loop: what a step does, and that a run resumes to the bit after a kill."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from jaxinfer.errors import CheckpointError, ConfigError, JobError
from jaxinfer.train import loop, metrics


@struct.dataclass
class LowRank:
    """A leaf that is no array, as adapters and quantized weights are."""

    a: jax.Array
    b: jax.Array


def objective(params, batch, key):
    """A regression with noise from the key, weighted by the number of rows that count."""
    x, y, weight = batch
    hidden = jnp.tanh(x @ params["w"] + (x @ params["adapter"].a) @ params["adapter"].b)
    hidden = jnp.where(jax.random.bernoulli(key, 0.9, hidden.shape), hidden, 0.0)
    error = jnp.mean((hidden @ params["v"] - y) ** 2, axis=-1)
    return jnp.sum(error * weight) / jnp.sum(weight), {"weight": jnp.sum(weight)}


def data(step):
    rng = np.random.default_rng((7, step))
    rows = 8 if step < 6 else 4  # a new shape, as at the border of two stages
    return tuple(rng.normal(size=(rows, n)).astype(np.float32) for n in (6, 2)) + (np.ones(rows, np.float32),)


def recipe(**changes):
    return loop.Recipe(
        **{
            "objective": objective,
            "data": data,
            "optimizer": optax.sgd(1e-2, momentum=0.9),
            "schedule": lambda step: 1e-2,
            "tokens": lambda batch: len(batch[0]),
            "ema_decay": 0.9,
            "identity": {"name": "toy"},
            **changes,
        }
    )


def fresh(which):
    rng = np.random.default_rng(0)
    w, v, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 5), (5, 2), (6, 2), (2, 5)))
    return loop.init_state({"w": w, "v": v, "adapter": LowRank(a, b)}, which, jax.random.key(1))


def digest(state):
    state = state.replace(key=jax.random.key_data(state.key))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


CONFIG = loop.LoopConfig(steps=12, save_every=3, evaluate_every=5, curve=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    which = recipe()
    return loop.train(which, fresh(which), CONFIG, tmp_path_factory.mktemp("undisturbed"))


def test_step_counts_completed_updates_and_names_the_checkpoint(undisturbed, tmp_path):
    assert int(undisturbed.step) == 12
    which = recipe()
    state = loop.train(which, fresh(which), loop.LoopConfig(steps=3, curve=False), tmp_path)
    checkpoints = loop.Checkpoints(tmp_path / "checkpoints", identity=which.identity)
    assert checkpoints.latest() == 3
    assert digest(checkpoints.restore(fresh(which))) == digest(state)
    by_hand = fresh(which)
    for step in range(3):
        by_hand, _ = jax.jit(loop.make_train_step(which))(by_hand, data(step))
    assert digest(by_hand) == digest(state)


def test_a_run_killed_with_sigkill_resumes_to_the_same_bits(undisturbed, tmp_path):
    script = textwrap.dedent("""
        import importlib.util, os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_default_matmul_precision", "highest")
        spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
        toy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(toy)
        def data(step):
            if step == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return toy.data(step)
        which = toy.recipe(data=data)
        toy.loop.train(which, toy.fresh(which), toy.CONFIG, sys.argv[2])
    """)
    killed = subprocess.run([sys.executable, "-c", script, __file__, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    which = recipe()
    assert loop.Checkpoints(tmp_path / "checkpoints").latest() == 6  # updates 7 and 8 are lost and made again
    state = loop.train(which, fresh(which), CONFIG, tmp_path)
    assert digest(state) == digest(undisturbed)
    steps = [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 13))


def test_the_digest_sees_data_that_is_no_function_of_the_step(undisturbed, tmp_path):
    calls = iter(range(100))  # the planted bug: an iterator that starts again after the resume
    which = recipe(data=lambda step: data(next(calls)))
    loop.train(which, fresh(which), loop.LoopConfig(steps=6, curve=False), tmp_path)
    calls = iter(range(100))
    assert digest(loop.train(which, fresh(which), CONFIG, tmp_path)) != digest(undisturbed)


def test_sigterm_saves_and_a_second_start_goes_on(undisturbed, tmp_path):
    def interrupted(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return data(step)

    which = recipe(data=interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Preempted, match="after step 5"):
        loop.train(which, fresh(which), CONFIG, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    which = recipe()
    assert digest(loop.train(which, fresh(which), CONFIG, tmp_path)) == digest(undisturbed)
    assert loop.EXIT_PREEMPTED == 75


def test_accumulated_gradients_equal_the_whole_batch_also_with_uneven_weights():
    x, y, _ = data(0)
    weight = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)

    def deterministic(params, batch, key):
        x, y, weight = batch
        error = jnp.mean((x @ params["w"] @ params["v"] - y) ** 2, axis=-1)
        return jnp.sum(error * weight) / jnp.sum(weight), {"weight": jnp.sum(weight), "error": jnp.mean(error)}

    whole, parts = recipe(objective=deterministic), recipe(objective=deterministic, accumulate=2)
    one, told = jax.jit(loop.make_train_step(whole))(fresh(whole), (x, y, weight))
    split = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), (x, y, weight))
    two, told_too = jax.jit(loop.make_train_step(parts))(fresh(parts), split)
    assert told["weight"] == told_too["weight"] == 5
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(told[name], told_too[name], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, two.params)


def test_what_is_frozen_is_read_and_left_alone(tmp_path):
    def apart(params, batch, key, frozen):
        return objective({**params, **frozen}, batch, key)

    state = fresh(recipe())
    frozen = {"v": state.params["v"]}
    trained = {k: v for k, v in state.params.items() if k != "v"}
    which = recipe(objective=apart, frozen=frozen, accumulate=1)
    begun = loop.init_state(trained, which, jax.random.key(1))
    ended = loop.train(which, begun, loop.LoopConfig(steps=3, curve=False), tmp_path)
    masked = recipe(optimizer=optax.masked(optax.set_to_zero(), {"w": False, "v": True, "adapter": False}))
    masked = recipe(optimizer=optax.chain(recipe().optimizer, masked.optimizer))
    same = fresh(masked)
    for i in range(3):
        same, _ = jax.jit(loop.make_train_step(masked))(same, data(i))
    assert set(ended.params) == {"w", "adapter"}
    for name in ended.params:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ended.params[name], same.params[name])
    np.testing.assert_array_equal(frozen["v"], state.params["v"])


def test_the_ema_is_the_running_mean_of_the_params():
    which = recipe()
    state, step = fresh(which), jax.jit(loop.make_train_step(which))
    mean = np.asarray(state.params["w"])
    for i in range(4):
        state, _ = step(state, data(i))
        decay = min(0.9, (1 + i) / (10 + i))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-5)


def test_metrics_evaluation_and_curve_are_written(tmp_path):
    seen = []
    which = recipe(evaluate=lambda params: {"error": float(seen.append(params) or len(seen))})
    config = loop.LoopConfig(steps=4, evaluate_every=2, log_every=2)
    state = loop.train(which, fresh(which), config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert rows[3]["evaluation"] == {"error": 2.0}
    logged = rows[2]
    assert logged["tokens"] == 16 and logged["total_tokens"] == 32 and logged["learning_rate"] == pytest.approx(1e-2)
    assert {"loss", "grad_norm", "step_seconds", "data_wait_seconds", "tokens_per_second"} <= set(logged)
    np.testing.assert_array_equal(seen[-1]["w"], state.ema["w"])  # the mean is what is evaluated
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_params_that_are_held_to_a_device_do_not_compile_the_step_twice(tmp_path, caplog):
    params = jax.device_put(fresh(recipe()).params, jax.devices()[0])
    state = loop.init_state(params, recipe(), jax.random.key(3))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        loop.train(recipe(), state, loop.LoopConfig(steps=4, curve=False), tmp_path)
    compiled = [r for r in caplog.messages if r.startswith("Finished XLA compilation of jit(train_step)")]
    assert len(compiled) == 1


def test_errors_name_what_is_wrong(tmp_path):
    which = recipe()
    with pytest.raises(CheckpointError, match="no checkpoint below"):
        loop.Checkpoints(tmp_path / "none").restore(fresh(which))
    loop.train(which, fresh(which), loop.LoopConfig(steps=1, curve=False), tmp_path)
    other = recipe(identity={"name": "other"})
    with pytest.raises(ConfigError, match="name: saved 'toy', now 'other'"):
        loop.train(other, fresh(other), CONFIG, tmp_path)
    broken = recipe(objective=lambda params, batch, key: (jnp.nan * jnp.sum(params["w"]), {}))
    with pytest.raises(JobError, match="the loss is nan at step 1"):
        loop.train(broken, fresh(broken), CONFIG, tmp_path / "broken")


def no_number(params, batch, key):
    """A loss that stops being a number once batches are small, from update 7 on."""
    loss, metrics = objective(params, batch, key)
    return loss * (jnp.nan if len(batch[0]) == 4 else 1.0), metrics


def root_of_zero(params, batch, key):
    """A finite loss whose gradient is not, once batches are small."""
    loss, metrics = objective(params, batch, key)
    return (loss + jnp.sqrt(0 * jnp.sum(params["w"])) if len(batch[0]) == 4 else loss), metrics


@pytest.mark.parametrize("broken", ["no_number", "root_of_zero"])
def test_what_is_not_finite_is_not_saved_also_between_logged_steps(tmp_path, broken):
    which = recipe(objective=globals()[broken])
    config = loop.LoopConfig(steps=12, save_every=3, log_every=12, curve=False)
    with pytest.raises(JobError, match="is nan at step 9; the last checkpoint is before it: that of step 6 below"):
        loop.train(which, fresh(which), config, tmp_path)
    checkpoints = loop.Checkpoints(tmp_path / "checkpoints", identity=which.identity)
    kept = checkpoints.restore(fresh(which))
    assert int(kept.step) == 6 and all(np.isfinite(x).all() for x in jax.tree.leaves((kept.params, kept.ema)))


def test_without_resume_an_older_run_is_replaced(undisturbed, tmp_path):
    which = recipe()
    loop.train(which, fresh(which), CONFIG, tmp_path)
    again = loop.train(which, fresh(which), dataclasses.replace(CONFIG, steps=6), tmp_path, resume=False)
    assert int(again.step) == loop.Checkpoints(tmp_path / "checkpoints").latest() == 6
    assert digest(loop.train(which, fresh(which), CONFIG, tmp_path)) == digest(undisturbed)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: x [No space left on device]")],
)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, undisturbed, error):
    which = recipe()
    checkpoints = loop.Checkpoints(tmp_path / "checkpoints", identity=which.identity)
    state = fresh(which)
    checkpoints.save(state)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(
        CheckpointError, match="cannot save step 12 .*: no space left on device; .* of step 0 is intact"
    ):
        checkpoints.save(undisturbed)
    assert digest(checkpoints.restore(state)) == digest(state)


def test_a_fingerprint_tells_trees_apart():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(())}
    assert loop.fingerprint(tree) == loop.fingerprint(jax.tree.map(jnp.array, tree))
    others = ({**tree, "b": jnp.zeros(())}, {**tree, "a": tree["a"].T}, {"c": tree["a"], "b": tree["b"]})
    assert len({loop.fingerprint(other) for other in (tree, *others)}) == 4


class Remembering(loop.Source):
    """Batches that depend on the params, and on how many were asked for."""

    def __init__(self):
        self.asked = 0

    def next(self, params, step):
        self.asked += 1
        x, y, weight = data(step)
        return x + np.float32(self.asked), y * np.asarray(params["w"])[0, 0], weight

    def state(self):
        return {"asked": self.asked}

    def restore(self, state):
        self.asked = state["asked"]


class Forgetful(Remembering):
    """The planted bug: what was remembered is not read back."""

    def restore(self, state):
        pass


def test_a_source_goes_on_from_what_the_checkpoint_holds_of_it(tmp_path):
    def train(folder, steps, kind=Remembering):
        plain = lambda params, batch, key: (jnp.mean((batch[0] @ params["w"] @ params["v"] - batch[1]) ** 2), {})  # noqa: E731
        which = recipe(data=kind(), objective=plain, ema_decay=None)
        return digest(loop.train(which, fresh(which), loop.LoopConfig(steps=steps, curve=False), folder))

    whole = train(tmp_path / "whole", 5)
    train(tmp_path / "cut", 3)
    shutil.copytree(tmp_path / "cut", tmp_path / "copy")
    assert train(tmp_path / "cut", 5) == whole
    assert train(tmp_path / "copy", 5, Forgetful) != whole


def test_a_source_without_its_state_is_told(tmp_path):
    which = recipe()
    loop.train(which, fresh(which), loop.LoopConfig(steps=1, curve=False), tmp_path)
    which = recipe(data=Remembering())
    with pytest.raises(CheckpointError, match="step 1 below"):
        loop.train(which, fresh(which), CONFIG, tmp_path)
