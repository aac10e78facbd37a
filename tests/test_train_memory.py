"""Training within less memory: the gradients stay, the memory falls, and no file outlives its process."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, JobError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.train import disk_offload, lm, loop
from jaxinfer.train.activation_store import ActivationStore, sweep
from jaxinfer.train.disk_offload import OffloadStep, keep_from, offloaded, profiled
from jaxinfer.train.remat import POLICIES, remat

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=96, max_length=128
)
STEP = Step(CONFIG)


@pytest.fixture(scope="module")
def training():
    """Params and a batch of two packed rows."""
    ids = jax.random.randint(jax.random.key(1), (2, 128), 0, 64)
    segments = jnp.cumsum(jnp.arange(128) % 50 == 49) * jnp.ones((2, 1), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(128), (2, 128))
    batch = {"ids": ids, "targets": jnp.roll(ids, -1, 1), "segments": segments, "positions": positions}
    return STEP.init(jax.random.key(0)), batch


def gradient(step):
    def run(params, batch):
        return jax.grad(lambda p: lm.NextToken(step)(p, batch, None)[0])(params)

    return jax.jit(run)


@pytest.fixture(scope="module")
def plain(training):
    program = gradient(STEP).lower(*training).compile()
    return program(*training), program.memory_analysis().temp_size_in_bytes


def difference(found, expected):
    """Largest over leaves, relative to the leaf's largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def kept(step, training):
    """Bytes that the forward pass hands to the backward pass, weights among them."""
    params, batch = training
    pull = jax.eval_shape(lambda p: jax.vjp(lambda p: lm.NextToken(step)(p, batch, None)[0], p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


@pytest.mark.slow
def test_policies_keep_less_for_the_backward_pass(training):
    found = {policy: kept(remat(STEP, policy), training) for policy in POLICIES}
    assert found["full"] < 0.5 * found["none"]
    assert found["full"] == found["host"]  # as many bytes, in another place
    assert found["full"] < found["names"] < found["none"]
    assert found["full"] < found["dots"] < found["none"]


@pytest.mark.parametrize(
    "policy", ["full", *(pytest.param(p, marks=pytest.mark.slow) for p in ("dots", "names", "host"))]
)
def test_policies_keep_the_gradient(policy, training, plain):
    assert difference(gradient(remat(STEP, policy))(*training), plain[0]) < 1e-6


def test_host_policy_moves_the_layers_inputs_and_nothing_else(training):
    """Of each layer one array goes to the host's memory, its input."""
    params, batch = training
    objective = lm.NextToken(remat(STEP, "host"))
    text = str(jax.make_jaxpr(jax.grad(lambda p: objective(p, batch, None)[0]))(params))
    assert text.count("MemorySpace.Host") == CONFIG.num_layers


def test_what_remat_accepts():
    with pytest.raises(ConfigError, match="accepts none, dots, names, full, host"):
        remat(STEP, "half")
    with pytest.raises(ConfigError, match="accepts attention, mlp"):
        remat(STEP, "names", ("attentions",))
    with pytest.raises(ConfigError, match="accepts a Step"):
        remat(OffloadStep(CONFIG), "full")


def test_gradients_through_the_disk_are_the_same_bits(training, plain, tmp_path):
    expected, everything = plain
    with ActivationStore(tmp_path) as store:
        step = OffloadStep.of(STEP, store, smallest=1000)
        program = gradient(step).lower(*training).compile()
        for _ in range(2):
            found = program(*training)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            assert len(store) == 0
            assert not list(tmp_path.rglob("*.bin"))
        assert store.counts.written + store.counts.forwarded > 0
        assert program.memory_analysis().temp_size_in_bytes < 0.6 * everything
        params, batch = training
        lm.NextToken(step)(params, batch, None)  # no gradient: nothing is written
        assert len(store) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wrong_activations_are_seen(training, plain, tmp_path):
    """The planted bug: a store that gives back the activations of another layer."""

    class Wrong(ActivationStore):
        def read(self, ticket):
            arrays = super().read(ticket)
            self.first = getattr(self, "first", arrays)
            return self.first

    with Wrong(tmp_path) as store:
        found = gradient(OffloadStep.of(STEP, store, smallest=1000))(*training)
        assert difference(found, plain[0]) > 1e-3


@pytest.mark.slow
def test_kept_layers_write_nothing(training, plain, tmp_path):
    with ActivationStore(tmp_path) as store:
        step = OffloadStep.of(STEP, store, smallest=1000, keep_from=1)
        store.begin_profile()
        found = gradient(step)(*training)
        jax.block_until_ready(found)
        assert len(store.end_profile()[0]) == 1  # the first layer's
        jax.tree.map(np.testing.assert_array_equal, found, plain[0])
        with pytest.raises(ConfigError, match="accepts 0 to 3"):
            OffloadStep.of(STEP, store, keep_from=4)


@pytest.mark.slow
def test_under_accumulation_in_the_training_loop(training, tmp_path):
    """Two microbatches in a scan, each with its own files; the loop's update is the plain one."""
    import optax

    params, batch = training
    parts = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), batch)
    with ActivationStore(tmp_path) as store:

        def updated(step):
            recipe = loop.Recipe(lm.NextToken(step), lambda i: parts, optax.sgd(0.1), accumulate=2)
            state = loop.init_state(params, recipe, jax.random.key(0))
            return jax.jit(loop.make_train_step(recipe))(state, parts)[0].params

        found, expected = updated(OffloadStep.of(STEP, store, smallest=1000)), updated(STEP)
        assert difference(found, expected) < 1e-6
        assert len(store) == 0


def test_a_slow_disk_forwards_from_memory(tmp_path):
    """What is asked for while it is being written comes from memory; a file is written or not, and none is left."""
    arrays = [np.arange(1000, dtype=np.float32) + i for i in range(4)]
    with ActivationStore(tmp_path, threads=1) as store:
        write = store._write
        store._write = lambda *a: (time.sleep(0.05), write(*a))
        tickets = [store.write([a, a[:3]]) for a in arrays]
        for ticket, array in zip(reversed(tickets), reversed(arrays), strict=True):
            found = store.read(ticket)
            np.testing.assert_array_equal(found[0], array)
            np.testing.assert_array_equal(found[1], array[:3])
        assert store.counts.forwarded > 0
        with pytest.raises(JobError, match="read before"):
            store.read(tickets[0])
        time.sleep(0.3)
        assert not list(tmp_path.rglob("*.bin"))
    with ActivationStore(tmp_path) as store:  # and through the disk
        tickets = [store.write([a]) for a in arrays]
        while store.counts.written < sum(a.nbytes for a in arrays):
            time.sleep(0.01)
        assert [float(store.read(t)[0][0]) for t in reversed(tickets)] == [3, 2, 1, 0]
        assert store.counts.forwarded == 0
        assert store.counts.read == store.counts.written == store.counts.on_disk


def test_waiting_writes_stay_within_the_budget(tmp_path):
    with ActivationStore(tmp_path, budget=10_000, threads=1) as store:
        for _ in range(8):
            store.write([np.zeros(1000, np.float32)])
        assert store.counts.pending <= 10_000


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    with ActivationStore(tmp_path) as store:
        monkeypatch.setattr(store, "path", lambda ticket: __import__("pathlib").Path("/dev/full"))
        ticket = store.write([np.zeros(100_000, np.float32)])
        while store._failure is None:
            time.sleep(0.01)
        with pytest.raises(JobError, match="no space left on device"):
            store.read(ticket)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot keep activations here"):
        ActivationStore(blocked)


def test_a_killed_process_is_swept_and_a_living_one_is_not(tmp_path):
    code = f"""
        import time, numpy as np
        from jaxinfer.train.activation_store import ActivationStore
        store = ActivationStore({str(tmp_path)!r})
        store.write([np.zeros(1000)])
        while store.counts.written == 0: time.sleep(0.01)
        print("ready", flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        left = next(tmp_path.iterdir())
        assert sweep(tmp_path) == []  # it lives
        process.send_signal(signal.SIGKILL)
    assert list(left.glob("*.bin"))
    with ActivationStore(tmp_path) as store:
        assert not left.exists()
        assert [p for p in tmp_path.iterdir()] == [store.folder]


def test_keep_rule_of_the_paper():
    """Three equal layers of 1 s: layer 0 is needed again after 9 s, layer 1 after 7, layer 2 after 5."""
    times = [1.0, 1.0, 1.0]
    assert keep_from(times, [1, 1, 1], bandwidth=2 / 9 * 0.99) == 0
    assert keep_from(times, [1, 1, 1], bandwidth=2 / 9 * 1.01) == 1
    assert keep_from(times, [1, 1, 1], bandwidth=3 / 7 * 1.01) == 2
    assert keep_from(times, [1, 1, 1], bandwidth=4 / 5 * 1.01) == 3
    with pytest.raises(ConfigError, match="accepts as many"):
        keep_from([1.0], [1, 2], 1.0)


@pytest.mark.slow
def test_a_profile_chooses_for_fast_and_slow_disks(training, tmp_path):
    """A disk that takes 200 ms a file leaves layers in memory."""
    with ActivationStore(tmp_path) as store:
        step = OffloadStep.of(STEP, store, smallest=1000)
        programs = {}

        def run(step):
            program = programs.setdefault(step, gradient(step))
            jax.block_until_ready(program(*training))

        fast = profiled(step, run)
        write = store._write
        store._write = lambda ticket, kept: _slowly(store, write, ticket, kept)
        slow = profiled(step, run)
        assert 0 <= fast.keep_from <= 3
        assert 0 <= slow.keep_from < 3
        assert dataclasses.replace(slow, keep_from=None) == step


def _slowly(store, write, ticket, kept):
    with store._using_disk():
        time.sleep(0.2)
    write(ticket, kept)


def test_any_function_can_be_offloaded(tmp_path):
    """Weights stay where they are, and what is saved twice is written once."""

    def function(weights, x):
        return jnp.sin(x @ weights) * x

    weights, x = jax.random.normal(jax.random.key(0), (8, 8)), jax.random.normal(jax.random.key(1), (16, 8))
    with ActivationStore(tmp_path) as store:
        store.begin_profile()
        loss = lambda f: lambda w, x: jnp.sum(f(w, x) ** 2)  # noqa: E731
        run = jax.jit(jax.grad(loss(offloaded(function, store, smallest=64)), (0, 1)))
        found = jax.block_until_ready(run(weights, x))
        expected = jax.jit(jax.grad(loss(function), (0, 1)))(weights, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
        ((_, size),) = store.end_profile()[0]
        assert size <= 3 * x.nbytes
    assert disk_offload.SMALLEST == 2**23
