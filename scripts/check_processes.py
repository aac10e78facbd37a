"""The proof that several processes do what one does, and that the death of any of them loses and doubles nothing.

    python scripts/check_processes.py            # three kills of each kind; some minutes on 2 cores
    python scripts/check_processes.py --kills 1 --only train

On a random model of two layers. Training (fully sharded over eight virtual CPU devices) and a batch job (the real
command line, `jaxinfer generate --mesh data=2,tensor=4`) run once in one process of eight devices and once in two of
four, over gloo: losses within 1e-6 and the same answers. Each process reads only the bytes of its own shards. Then one
of the two processes, in turns, is killed with SIGKILL after a random step or shard: the other must end with code 75 and
name the dead one, and the same command given again must end in the same bits. SIGTERM at either process makes both save
at one step. A checkpoint is restored onto another mesh, with equal arrays. Of two groups of two processes on one batch
job one loses a process; the other group finishes the job.

Prints a table; exits 0 and writes scripts/results/check_processes-<device>.json, or exits 1 and says what did not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEPS, SAVE_EVERY, PAUSE = 24, 4, 0.05  # of the training run; seconds that a step is held up, so that kills hit steps
AGAIN = 75
SILENT = 60.0  # seconds that a survivor may take to end


class Failed(Exception):
    """What did not hold."""


def make_model(folder: Path) -> Path:
    """A Hugging Face directory of a random model whose axes eight devices divide, with tinycode's tokenizer."""
    import jax
    import numpy as np

    from jaxinfer.checkpoint import hub
    from jaxinfer.models import ModelConfig
    from jaxinfer.models.hf import save_directory
    from jaxinfer.models.step import Step

    config = ModelConfig(
        vocab_size=4096, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, mlp_size=128,
        max_length=128, eos=(0,),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (rng.normal(0, 0.2, x.shape) if len(x.shape) > 1 else np.ones(x.shape)).astype(np.float32),
        jax.eval_shape(Step(config).init, jax.random.key(0)),
    )
    save_directory(config, params, folder, tokenizer_from=hub.resolve("tinycode"))
    return folder


def make_rows(path: Path, count: int) -> Path:
    """Prompts, greedy and sampled."""
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            row = {"id": i, "prompt": f"def f{rng.randrange(1000)}(x):\n    return", "max_tokens": rng.randint(2, 8)}
            file.write(json.dumps(row | ({"temperature": 0.8} if i % 2 else {})) + "\n")
    return path


def train_worker(options: argparse.Namespace) -> int:
    """One process of the training run, or the whole of it; writes `reads-<i>.json` and `result.json` to its folder."""
    from jaxinfer.sharding import launch
    from jaxinfer.train.loop import Preempted

    try:
        with launch.joined(launch.launch_of(options.coordinator, options.processes, options.process_id)):
            _train(options)
    except Preempted as error:
        print(f"preempted: {error}", flush=True)
        return AGAIN
    return 0


def _train(options: argparse.Namespace) -> None:
    import jax
    import numpy as np
    import optax

    from jaxinfer.checkpoint import safetensors_io
    from jaxinfer.models import Step, hf
    from jaxinfer.sharding.launch import is_writer
    from jaxinfer.sharding.mesh import make_mesh
    from jaxinfer.sharding.strategies import sharded
    from jaxinfer.train import lm, loop
    from jaxinfer.train.processes import batch_axes

    config = hf.load_config(options.model)
    axes = {"fsdp": 8} if options.mesh is None else json.loads(options.mesh)
    step = sharded(Step(config), make_mesh(axes, config))
    reads, to_host = [0], safetensors_io.to_host

    def counted(source: Any, dtype: Any = None, index: Any = None) -> np.ndarray:
        out = to_host(source, dtype, index)
        reads[0] += out.size * source.dtype.itemsize
        return out

    safetensors_io.to_host = counted
    params = hf.load_directory(options.model, dtype="float32", shardings=step.shardings())[1]
    safetensors_io.to_host = to_host
    folder = Path(options.train)
    folder.mkdir(exist_ok=True)
    (folder / f"reads-{jax.process_index()}.json").write_text(json.dumps(reads[0]))

    def data(number: int) -> dict[str, np.ndarray]:
        time.sleep(options.pause)
        ids = np.random.default_rng(number).integers(1, config.vocab_size, (8, 17), dtype=np.int32)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        return {"ids": ids[:, :-1], "targets": ids[:, 1:], "segments": positions * 0, "positions": positions}

    # Adam's usual eps would divide a gradient that is rounding alone by its own size, and that may differ in sign from
    # one division of the sums to another: the loss then differs by 6e-6 at the one step that meets such a weight again.
    recipe = loop.Recipe(
        lm.NextToken(step), data, optax.adam(1e-3, eps=1e-3), ema_decay=0.9, batch_sharding=batch_axes(step.mesh),
        identity={"recipe": "check"},
    )  # fmt: skip
    state = loop.init_state(params, recipe, jax.random.key(0))
    steps = loop.LoopConfig(steps=options.steps, save_every=SAVE_EVERY, curve=False)
    state = loop.train(recipe, state, steps, folder)
    told = {"digest": digest(state), "losses": _losses(folder)}
    if is_writer():
        (folder / "result.json").write_text(json.dumps(told))


def digest(state: Any) -> str:
    """Of all arrays, gathered from wherever they lie; all processes must call it."""
    import hashlib

    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key))):
        found.update(np.asarray(multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
    return found.hexdigest()


def _losses(folder: Path) -> list[float]:
    from jaxinfer.train import metrics

    path = folder / "metrics.jsonl"
    rows = [row for row in metrics.read(path) if "loss" in row] if path.exists() else []
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise Failed(f"{path}: the steps are {[row['step'] for row in rows]}")
    return [row["loss"] for row in rows]


@dataclasses.dataclass
class Group:
    """The processes of one program, each with a log."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        self.processes[number].send_signal(how)

    def wait(self, seconds: float = 600.0) -> list[int]:
        """The exit codes."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.01, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise Failed(f"a process did not end within {seconds:.0f} s:\n{self.told()}") from None
        finally:
            self.end()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def told(self, number: int | None = None) -> str:
        logs = self.logs if number is None else [self.logs[number]]
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)

    @property
    def over(self) -> bool:
        return any(process.poll() is not None for process in self.processes)


@dataclasses.dataclass
class Bench:
    """Starts programs in a folder of their own."""

    folder: Path
    groups: list[Group] = dataclasses.field(default_factory=list)

    def start(self, command: Sequence[str], *, processes: int, devices: int) -> Group:
        """`command` in so many processes of so many devices, joined where they are several."""
        self.folder.mkdir(exist_ok=True)
        port = _free_port()
        # XLA_FLAGS are those of the tests that call this; here programs run as users start them.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / f"compiled-{devices}"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        started, logs = [], []
        for i in range(processes):
            joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process-id", str(i)]
            logs.append(self.folder / f"log-{len(self.groups)}-{i}.txt")
            with logs[-1].open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *command, *(joined if processes > 1 else [])],
                        cwd=self.folder,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )  # fmt: skip
                )
        self.groups.append(Group(self.folder, started, logs))
        return self.groups[-1]

    def run(self, command: Sequence[str], *, processes: int, devices: int) -> float:
        """The same to its end, which must be a good one; seconds."""
        begun = time.monotonic()
        group = self.start(command, processes=processes, devices=devices)
        codes = group.wait()
        if any(codes):
            raise Failed(f"the processes ended with {codes}:\n{group.told()}")
        return time.monotonic() - begun

    def end(self) -> None:
        for group in self.groups:
            group.end()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def killed(group: Group, victim: int, reached: Callable[[], bool], wait: float) -> float | None:
    """Kills `victim` `wait` seconds after the work has begun; the seconds in which the survivors then ended, or None
    where the work was done before. Each must end with 75 and name the victim."""
    while not (reached() or group.over):
        time.sleep(0.05)
    until = time.monotonic() + wait
    while time.monotonic() < until and not group.over:
        time.sleep(0.02)
    if group.over:
        codes = group.wait()
        if any(codes):
            raise Failed(f"nobody was killed and the processes ended with {codes}:\n{group.told()}")
        return None
    group.kill(victim)
    begun = time.monotonic()
    codes = group.wait(SILENT)
    took = time.monotonic() - begun
    for number, code in enumerate(codes):
        if number == victim:
            continue
        if code != AGAIN or f"process {victim} of {len(codes)} is gone" not in group.told(number):
            raise Failed(f"process {victim} was killed; process {number} ended with {code}:\n{group.told(number)}")
    return took


def train_command(model: Path, folder: Path, *, steps: int = STEPS, pause: float = PAUSE, mesh: str = "") -> list[str]:
    given = ["--train", str(folder), "--model", str(model), "--steps", str(steps), "--pause", str(pause)]
    return [str(Path(__file__).resolve()), *given, *(["--mesh", mesh] if mesh else [])]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def check_equal_training(bench: Bench, model: Path, *, steps: int = STEPS) -> dict[str, Any]:
    """One process of eight devices and two of four: losses, bytes read; and a restore onto another mesh."""
    one, two = bench.folder / "one", bench.folder / "two"
    seconds = bench.run(train_command(model, one, steps=steps, pause=0), processes=1, devices=8)
    together = bench.run(train_command(model, two, steps=steps, pause=0), processes=2, devices=4)
    a, b = result(one), result(two)
    worst = max(abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"], strict=True))
    if len(a["losses"]) != steps or not worst <= 1e-6:
        raise Failed(f"losses of two processes differ from those of one by {worst:.1e} of them")
    whole = json.loads((one / "reads-0.json").read_text())
    parts = [json.loads((two / f"reads-{i}.json").read_text()) for i in range(2)]
    if max(parts) > 0.6 * whole:
        raise Failed(f"of {whole} bytes the two processes read {parts}: more than their own")
    other = train_command(model, two, steps=steps, mesh=json.dumps({"data": 2, "tensor": 4}))
    bench.run(other, processes=1, devices=8)
    if (restored := result(two)["digest"]) != b["digest"]:
        raise Failed(f"restored onto another mesh the arrays are {restored}; saved: {b['digest']}")
    return {
        "what": "training: one process, two",
        "worst_relative_loss": worst,
        "bitwise": a["digest"] == b["digest"],
        "bytes_read": [whole, *parts],
        "restored_onto_another_mesh": True,
        "seconds": [seconds, together],
        "digest": b["digest"],
    }


def check_killed_training(bench: Bench, model: Path, digest: str, rng: random.Random, number: int) -> dict[str, Any]:
    """A run of two processes, one of which is killed at a random moment; given again it ends in the same bits."""
    folder = bench.folder / f"killed-{number}"
    victim, step, wait = number % 2, rng.randrange(1, STEPS), rng.uniform(0, 2 * PAUSE)
    group = bench.start(train_command(model, folder), processes=2, devices=4)
    took = killed(group, victim, lambda: len(_steps(folder)) >= step, wait)
    at = len(_steps(folder))
    bench.run(train_command(model, folder), processes=2, devices=4)
    if result(folder)["digest"] != digest:
        raise Failed(f"killed after {at} steps and resumed, the run ended in {result(folder)}; undisturbed: {digest}")
    return {"what": f"training: SIGKILL of {victim}", "after_steps": at, "survivor_seconds": took, "equal": True}


def _steps(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def check_preempted_training(bench: Bench, model: Path, digest: str, victim: int) -> dict[str, Any]:
    """SIGTERM at one of two processes: both save at one step and end with 75."""
    folder = bench.folder / f"preempted-{victim}"
    group = bench.start(train_command(model, folder), processes=2, devices=4)
    while not (_steps(folder) or group.over):
        time.sleep(0.05)
    group.kill(victim, signal.SIGTERM)
    codes = group.wait(SILENT)
    steps = [re.findall(r"after step (\d+)", group.told(i)) for i in range(2)]
    if codes != [AGAIN, AGAIN] or steps[0] != steps[1] or len(steps[0]) != 1:
        raise Failed(f"SIGTERM at process {victim}: codes {codes}, steps {steps}:\n{group.told()}")
    if not (folder / "checkpoints" / steps[0][0]).is_dir():
        raise Failed(f"SIGTERM at process {victim}: no checkpoint of step {steps[0][0]}")
    bench.run(train_command(model, folder), processes=2, devices=4)
    if result(folder)["digest"] != digest:
        raise Failed(f"preempted at step {steps[0][0]} and resumed, the run ended in other bits")
    return {"what": f"training: SIGTERM at {victim}", "after_steps": int(steps[0][0]), "equal": True}


def batch_command(model: Path, rows: Path, output: Path) -> list[str]:
    given = ["--model", str(model), "--input", str(rows), "--output", str(output), "--batch-size", "8"]
    return ["-m", "jaxinfer", "generate", *given, "--mesh", "data=2,tensor=4"]


def check_equal_batch(bench: Bench, model: Path, rows: Path) -> dict[str, Any]:
    """One process of eight devices and two of four: the same answers."""
    one, two = bench.folder / "one.jsonl", bench.folder / "two.jsonl"
    seconds = bench.run(batch_command(model, rows, one), processes=1, devices=8)
    together = bench.run(batch_command(model, rows, two), processes=2, devices=4)
    if one.read_bytes() != two.read_bytes():
        raise Failed(f"{one} and {two} differ")
    count = len(one.read_bytes().splitlines())
    return {"what": "batch: one process, two", "rows": count, "equal": True, "seconds": [seconds, together]}


def _parts(output: Path) -> int:
    return len(list(Path(f"{output}.job").glob("work-*/parts/*")))


def check_killed_batch(bench: Bench, model: Path, rows: Path, rng: random.Random, number: int) -> dict[str, Any]:
    """A job of two processes, one of which is killed at a random moment; given again it ends in the same bytes."""
    output, expected = bench.folder / f"killed-{number}.jsonl", (bench.folder / "two.jsonl").read_bytes()
    from jaxinfer.batch.manifest import SHARD_ROWS

    victim, command = (number + 1) % 2, batch_command(model, rows, output)
    shards = -(-len(rows.read_text().splitlines()) // SHARD_ROWS)
    shard = rng.randrange(shards)
    group = bench.start(command, processes=2, devices=4)
    took = killed(group, victim, lambda: _leased(output) and _parts(output) >= shard, rng.uniform(0, 2))
    at = _parts(output)
    bench.run(command, processes=2, devices=4)
    if output.read_bytes() != expected:
        raise Failed(f"killed with {at} shards committed and resumed, {output} differs")
    return {"what": f"batch: SIGKILL of {victim}", "shards_committed": at, "survivor_seconds": took, "equal": True}


def _leased(output: Path) -> bool:
    return any(Path(f"{output}.job").glob("work-*/leases/*"))


def check_batch_goes_on(bench: Bench, model: Path, rows: Path, victim: int) -> dict[str, Any]:
    """Two groups of two processes on one job. One loses a process; the other finishes it all."""
    output, expected = bench.folder / f"left-{victim}.jsonl", (bench.folder / "two.jsonl").read_bytes()
    command = batch_command(model, rows, output)
    first = bench.start(command, processes=2, devices=4)
    while not (_leased(output) or first.over):
        time.sleep(0.05)
    second = bench.start(command, processes=2, devices=4)
    took = killed(first, victim, lambda: True, 0.5)
    codes = second.wait()
    if any(codes) or output.read_bytes() != expected:
        raise Failed(f"the group that was left ended with {codes}:\n{second.told()}")
    return {"what": f"batch: group with {victim} killed, other goes on", "survivor_seconds": took, "equal": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--only", choices=("train", "batch"))
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--train", "--model", "--mesh", "--coordinator"):  # a worker's
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--processes", "--process-id", "--steps"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train_worker(options)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name) / "runs")
        found: list[dict[str, Any]] = []
        try:
            for row in checks(bench, Path(name), options):
                found.append(row)
                print("  ".join(f"{key}: {_shown(value)}" for key, value in row.items()), flush=True)
        except Failed as error:
            print(f"check_processes: {error}", file=sys.stderr)
            return 1
        finally:
            bench.end()
    if options.only is None:
        path = Path(__file__).parent / "results" / "check_processes-cpu.json"
        path.write_text(json.dumps({"kills": options.kills, "checks": found}, indent=1) + "\n")
    return 0


def checks(bench: Bench, folder: Path, options: argparse.Namespace):
    """All checks, one row of results each."""
    model, rows = make_model(folder / "model"), make_rows(folder / "rows.jsonl", options.rows)
    rng = random.Random(options.seed)
    if options.only != "batch":
        whole = check_equal_training(bench, model)
        yield whole
        for number in range(options.kills):
            yield check_killed_training(bench, model, whole["digest"], rng, number)
        for victim in range(2):
            yield check_preempted_training(bench, model, whole["digest"], victim)
    if options.only != "train":
        yield check_equal_batch(bench, model, rows)
        for number in range(options.kills):
            yield check_killed_batch(bench, model, rows, rng, number)
        for victim in range(2):
            yield check_batch_goes_on(bench, model, rows, victim)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str([float(f"{x:.3g}") for x in value]) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
