"""Two processes of four virtual devices over gloo do what one of eight does, and survive the death of either.

`scripts/check_processes.py` has the trials; here each runs once or so. Programs are started as users start them.
"""

import importlib.util
import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.checkpoint import safetensors_io
from jaxinfer.cli import main
from jaxinfer.errors import ConfigError
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.train import loop, metrics, processes

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_processes.py"


def load_script():
    spec = importlib.util.spec_from_file_location("check_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_processes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load_script()


def objective(params, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    return jnp.mean((jnp.tanh((batch["x"] + 0.1 * noise) @ params["w"]) - batch["y"]) ** 2), {}


def data(step):
    rng = np.random.default_rng(step)
    return {"x": rng.normal(size=(8, 16)).astype(np.float32), "y": rng.normal(size=(8, 4)).astype(np.float32)}


def recipe(**changes):
    return loop.Recipe(**{"objective": objective, "data": data, "optimizer": optax.adam(1e-2), **changes})


def fresh(which, sharding=None):
    w = np.random.default_rng(5).normal(size=(16, 4)).astype(np.float32)
    params = {"w": jnp.asarray(w) if sharding is None else jax.device_put(w, sharding)}
    return loop.init_state(params, which, jax.random.key(1))


CONFIG = loop.LoopConfig(steps=4, save_every=2, curve=False)


def losses(folder):
    return [row["loss"] for row in metrics.read(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return loop.train(recipe(), fresh(recipe()), CONFIG, folder), losses(folder)


def test_a_batch_split_over_a_mesh_gives_the_same_run_and_the_state_stays_as_it_lies(on_one_device, tmp_path):
    state, alone = on_one_device
    mesh = make_mesh({"fsdp": 8})
    lies = NamedSharding(mesh, PartitionSpec("fsdp"))
    which = recipe(batch_sharding=processes.batch_axes(mesh))
    there = loop.train(which, fresh(which, lies), CONFIG, tmp_path)
    assert there.params["w"].sharding == lies and there.opt_state[0].mu["w"].sharding == lies
    assert there.step.sharding.mesh == mesh  # what lay on one device is on all
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-6)
    np.testing.assert_allclose(there.params["w"], state.params["w"], rtol=1e-5, atol=1e-6)
    # Resumed on another mesh: equal arrays.
    other = NamedSharding(make_mesh({"data": 2, "tensor": 4}), PartitionSpec(None, "tensor"))
    like = processes.spread(fresh(which, other), other.mesh)
    restored = loop.Checkpoints(tmp_path / "checkpoints").restore(like)
    assert restored.params["w"].sharding == other
    for got, saved in zip(jax.tree.leaves(restored.params), jax.tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(got, saved)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(there.key))


def test_rows_of_this_process_alone_make_the_same_batch():
    sharding = processes.batch_axes(make_mesh({"data": 8}))
    whole, local = (processes.place_batch(data(0), sharding, local=local) for local in (False, True))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(local), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    assert whole["x"].addressable_shards[0].data.shape == (1, 16)


def test_what_cannot_be_placed_is_named(tmp_path):
    mesh = make_mesh({"data": 8})
    which = recipe(data=lambda step: {"x": np.zeros((6, 16), np.float32), "y": np.zeros((6, 4), np.float32)})
    which = loop.dataclasses.replace(which, batch_sharding=processes.batch_axes(mesh))
    with pytest.raises(ConfigError, match=r"\['x'\]: got shape \(6, 16\); accepted: one that .* divides"):
        loop.train(which, fresh(which), CONFIG, tmp_path)
    lies = NamedSharding(make_mesh({"fsdp": 4}), PartitionSpec("fsdp"))
    with pytest.raises(ConfigError, match="batch_sharding: got the mesh .*; accepted: the state's"):
        loop.train(which, fresh(which, lies), CONFIG, tmp_path)


def test_each_device_reads_only_its_bytes(tmp_path, monkeypatch):
    """What `check_equal_training` counts in two processes, here by shards of one."""
    read, to_host = [], safetensors_io.to_host

    def counted(source, dtype=None, index=None):
        out = to_host(source, dtype, index)
        read.append(out.nbytes)
        return out

    monkeypatch.setattr(safetensors_io, "to_host", counted)
    source = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
    mesh = make_mesh({"fsdp": 8})
    placed = safetensors_io.place(source, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    np.testing.assert_array_equal(placed, source)
    assert read == [source.nbytes // 8] * 8


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("generate", ("--processes", "2"), "processes: got it without a coordinator"),
        ("generate", ("--coordinator", "box"), "coordinator: got 'box' without processes and process id"),
        ("generate", ("--coordinator", "auto"), "no scheduler's variables are set"),
        ("train", ("--coordinator", "h:1", "--processes", "2", "--process-id", "2"), "process id: got 2"),
        ("train", ("--coordinator", "h:x", "--processes", "2", "--process-id", "1"), "accepted: host:port"),
    ],
)
def test_bad_start_up_options_are_one_line(command, options, words, capsys, tmp_path, monkeypatch):
    for name in ("SLURM_PROCID", "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    job = ("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    own = ("generate", *job) if command == "generate" else ("train", "lm", "--output", str(tmp_path / "out"))
    assert main([*own, *options]) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    found = check.Bench(tmp_path_factory.mktemp("processes"))
    yield found
    found.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return check.make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def alone(bench, model):
    """The training run in one process of eight devices, compiled as the two are: its folder and what it came to."""
    folder = bench.folder / "alone"
    bench.run(check.train_command(model, folder), processes=1, devices=8)
    return folder, check.result(folder)


@pytest.mark.slow
def test_two_processes_train_as_one_does_also_when_one_is_killed(bench, model, alone):
    """That the bits are those of two that were left alone is the script's to show: it runs them once more."""
    folder, expected = alone
    run = bench.folder / "killed"
    random.seed(3)
    victim = random.randrange(2)
    group = bench.start(check.train_command(model, run), processes=2, devices=4)
    check.killed(group, victim, lambda: bool(check._steps(run)), random.uniform(0, 1))
    bench.run(check.train_command(model, run, pause=0), processes=2, devices=4)
    np.testing.assert_allclose(check.result(run)["losses"], expected["losses"], rtol=1e-6)
    assert len(expected["losses"]) == check.STEPS
    whole = json.loads((folder / "reads-0.json").read_text())
    assert max(json.loads((run / f"reads-{i}.json").read_text()) for i in range(2)) < 0.6 * whole


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(bench, model, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxinfer.cli.compiled.use_cache", lambda: None)
    rows, two = check.make_rows(tmp_path / "rows.jsonl", 66), tmp_path / "two.jsonl"
    assert main(check.batch_command(model, rows, tmp_path / "one.jsonl")[2:]) == 0
    bench.run(check.batch_command(model, rows, two), processes=2, devices=4)
    assert two.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_the_command_line_trains_in_two_processes_and_a_sigterm_at_one_stops_both(bench, model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(12):
        (source / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 30)
    given = ["--target", str(model), "--data", str(source), "--batch-tokens", "256", "--length", "32"]
    command = ["-m", "jaxinfer", "train", "lm", *given, "--output", str(tmp_path / "out"), "--steps"]
    group = bench.start([*command, "2000"], processes=2, devices=4)
    while not (check._steps(tmp_path / "out" / "train") or group.over):
        time.sleep(0.1)
    group.kill(1, signal.SIGTERM)
    assert group.wait(60) == [75, 75], group.told()
    told = [re.findall(r"stopped by SIGTERM after step (\d+)", group.told(i)) for i in range(2)]
    assert told[0] == told[1] and len(told[0]) == 1
    bench.run([*command, str(int(told[0][0]) + 2)], processes=2, devices=4)  # goes on from there
    assert "bits_per_byte" in bench.groups[-1].told(0) and "bits_per_byte" not in bench.groups[-1].told(1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_trials_see_a_survivor_that_says_nothing(bench, monkeypatch):
    monkeypatch.setattr(check, "SILENT", 1.0)
    group = bench.start(["-c", "import time; time.sleep(60)"], processes=2, devices=1)  # the bug: nobody watches
    with pytest.raises(check.Failed, match="did not end within"):
        check.killed(group, 0, lambda: True, 0.1)
