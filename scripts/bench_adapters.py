"""Fine-tuning by LoRA, PaCA, SoKA and Hydra beside torch's `peft` LoRA: memory, time and loss of the same training.

    python scripts/bench_adapters.py                       # all sides: about four minutes on two quiet cores
    python scripts/bench_adapters.py --sides lora,peft-lora --steps 20 --seeds 0

The task: `tinycode` learns this project's own sources, which it has not seen (every tenth file is held out), as plain
causal windows. Every side runs in a process of its own on the same windows in the same order, float32, AdamW with the
same schedule, clipping and no decay, from step to step as its users would write it: ours `train.adapters` on the one
loop's step, theirs `peft` over `transformers`. Our LoRA and theirs start from the very same arrays, through a folder in
PEFT's format. PaCA has twice the rank, as in its paper, and Hydra half for its two branches, so that all train
about as many numbers.

A row a side and seed: `trained` numbers, `optimizer_bytes`, `temp_bytes` and `argument_bytes` of the compiled step
(XLA's memory analysis; torch has none), `rss_mib` before the first step and the peak, `seconds` the median step after
the first two, `loss` the mean of the last five training losses, `held_out` nats a token before and after. Timings mean
something on a quiet machine only; the other columns do not depend on it.

Writes scripts/results/bench_adapters-<device>.json and prints a table. Expected: `lora` and `peft-lora` end within 0.01
nats of each other on every seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("lora", "paca", "soka", "hydra", "peft-lora")
COLUMNS = ("side", "seed", "trained", "optimizer_kib", "temp_mib", "rss_mib", "peak_mib", "seconds", "loss", "held_out")
MODEL = "tinycode"
HELD_OUT = 16  # windows


def main() -> None:
    arguments = parse()
    if arguments.child:
        child(arguments)
        return
    from jaxinfer import measure

    settings = {name: getattr(arguments, name) for name in ("steps", "batch", "length", "rank", "rate", "seeds")}
    results = measure.Results("bench_adapters", settings=settings | {"model": MODEL})
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, Path(folder))
        for side in arguments.sides.split(","):
            for row in run(arguments, side, folder):
                results.add(**row)
            results.save()
    print(measure.text_table([shown(row) for row in results.rows], COLUMNS))
    print(f"wrote {results.save()}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", default="0,1,2", help="of lora and peft-lora; the others run the first")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.sides.split(",")) - set(SIDES)
    if unknown:
        parser.error(f"--sides: got {', '.join(sorted(unknown))}; accepted: {', '.join(SIDES)}")
    return arguments


def seeds_of(arguments: argparse.Namespace, side: str) -> list[int]:
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    return seeds if side.endswith("lora") else seeds[:1]


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """The windows of every seed, and LoRA's starts in PEFT's format: what all sides read."""
    import jax

    import jaxinfer
    from jaxinfer import quant
    from jaxinfer.models.adapters import save_adapter
    from jaxinfer.train import adapters, data

    lm = jaxinfer.load(MODEL, dtype="float32")
    corpus = data.standard_library(ROOT / "jaxinfer")
    end = lm.tokenizer.eos_ids[0]
    streams = [
        data.concatenate(data.encode(lm.tokenizer.backend, part), end=end) for part in (corpus.modules, corpus.held_out)
    ]
    np.save(folder / "held_out.npy", cut(streams[1], arguments.length)[:HELD_OUT])
    for seed in (int(seed) for seed in arguments.seeds.split(",")):
        windows = np.random.default_rng(seed).permutation(cut(streams[0], arguments.length))
        need = arguments.steps * arguments.batch
        np.save(folder / f"windows-{seed}.npy", np.resize(windows, (need, arguments.length + 1)))
        params = quant.adapt(lm.params, [(adapters.PROJECTIONS, quant.Lora(arguments.rank))], jax.random.key(seed))
        save_adapter(lm.config, params, folder / f"start-{seed}")


def cut(stream: np.ndarray, length: int) -> np.ndarray:
    """Windows [n, length + 1] that follow each other; a window's last token is the next one's first."""
    count = (len(stream) - 1) // length
    return np.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int32)


def run(arguments: argparse.Namespace, side: str, folder: str) -> list[dict[str, Any]]:
    """A side in a process of its own, so that its memory is its own."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("steps", "batch", "length", "rank", "rate", "seeds")]
    command = [sys.executable, __file__, *options, "--child", side, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed with {done.returncode}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        print(json.dumps(shown(row)), file=sys.stderr)
    return rows


def child(arguments: argparse.Namespace) -> None:
    side = theirs if arguments.child == "peft-lora" else ours
    for row in side(arguments, arguments.child, Path(arguments.folder)):
        print(json.dumps(row), flush=True)


def rows_of(
    arguments: argparse.Namespace, side: str, seed: int, windows: np.ndarray, update: Callable, score: Callable
) -> dict[str, Any]:
    """One training: `update(windows) -> loss`, `score() -> nats a token of the held-out windows`."""
    before, at_rest = score(), rss("now")
    losses, seconds = [], []
    for step in range(arguments.steps):
        begun = time.perf_counter()
        losses.append(update(windows[step * arguments.batch : (step + 1) * arguments.batch]))
        seconds.append(time.perf_counter() - begun)
    return {
        "side": side,
        "seed": seed,
        "first_loss": losses[0],
        "loss": statistics.fmean(losses[-5:]),
        "held_out_before": before,
        "held_out": score(),
        "seconds": statistics.median(seconds[2:] or seconds),
        "rss_mib": at_rest,
        "peak_mib": rss("peak"),
    }


def ours(arguments: argparse.Namespace, side: str, folder: Path) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import jaxinfer
    from jaxinfer import quant
    from jaxinfer.train import adapters, lm, loop

    model = jaxinfer.load(MODEL, dtype="float32")
    rank = arguments.rank
    specs = {
        "lora": quant.Lora(rank),
        "paca": quant.Paca(2 * rank),
        "soka": quant.Soka(rank),
        "hydra": quant.Hydra(rank // 2),
    }
    objective = lm.NextToken(model.step)
    shape = (arguments.batch, arguments.length)
    evaluate = jax.jit(lambda params, batch: objective(params, batch, None)[0])

    def batch(windows: np.ndarray) -> dict[str, np.ndarray]:
        ids = windows[:, :-1]
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        return {"ids": ids, "targets": windows[:, 1:], "segments": np.zeros_like(ids), "positions": positions}

    held_out = np.load(folder / "held_out.npy").reshape(-1, arguments.batch, arguments.length + 1)
    compiled = None
    for seed in seeds_of(arguments, side):
        params = quant.adapt(model.params, [(adapters.PROJECTIONS, specs[side])], jax.random.key(seed))
        windows = np.load(folder / f"windows-{seed}.npy")
        recipe = adapters.recipe(
            params,
            lambda step, windows=windows: batch(windows[step * shape[0] : (step + 1) * shape[0]]),
            steps=arguments.steps,
            objective=objective,
            rate=arguments.rate,
        )
        state = adapters.init_state(params, recipe, jax.random.key(seed))
        sizes = {"trained": count(state.params), "optimizer_bytes": size(state.opt_state)}
        if compiled is None:
            step = jax.jit(loop.make_train_step(recipe), donate_argnums=0)
            compiled = step.lower(state, batch(np.zeros((shape[0], shape[1] + 1), np.int32)), recipe.frozen).compile()
        if (memory := compiled.memory_analysis()) is not None:
            sizes |= {"temp_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes}
        held = {"state": state}

        def update(windows, compiled=compiled, recipe=recipe, held=held):
            held["state"], metrics = compiled(held["state"], batch(windows), recipe.frozen)
            return float(metrics["loss"])

        def score(recipe=recipe, held=held):
            params = adapters.finished(held["state"], recipe)
            return float(jnp.mean(jnp.stack([evaluate(params, batch(part)) for part in held_out])))

        yield rows_of(arguments, side, seed, windows, update, score) | sizes


def count(tree: Any) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def theirs(arguments: argparse.Namespace, side: str, folder: Path) -> Iterator[dict[str, Any]]:
    import warnings

    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from jaxinfer.checkpoint import hub
    from jaxinfer.train import lm

    warnings.simplefilter("ignore")
    held_out = np.load(folder / "held_out.npy").reshape(-1, arguments.batch, arguments.length + 1)
    schedule = lm.warmup_stable_decay(
        arguments.rate, steps=arguments.steps, warmup=max(1, min(20, arguments.steps // 4))
    )  # as train.adapters.recipe
    for seed in seeds_of(arguments, side):
        base = AutoModelForCausalLM.from_pretrained(hub.resolve(MODEL), dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / f"start-{seed}", is_trainable=True)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=arguments.rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        done = iter(range(arguments.steps))

        def loss_of(windows, model=model):
            rows = torch.from_numpy(windows.astype(np.int64))
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

        def update(windows, loss_of=loss_of, optimizer=optimizer, trained=trained, done=done):
            for group in optimizer.param_groups:
                group["lr"] = np.asarray(schedule(next(done))).item()
            loss = loss_of(windows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return float(loss.detach())

        def score(loss_of=loss_of):
            with torch.no_grad():
                return statistics.fmean(float(loss_of(part)) for part in held_out)

        windows = np.load(folder / f"windows-{seed}.npy")
        row = rows_of(arguments, side, seed, windows, update, score)
        states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        row |= {"trained": sum(p.numel() for p in trained)}
        yield row | {"optimizer_bytes": sum(x.numel() * x.element_size() for x in states)}


def rss(which: str) -> float:
    """Resident memory of this process in MiB, "now" or at its "peak"."""
    if which == "peak":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the table has it."""
    temp = row.get("temp_bytes")
    out = {name: row[name] for name in ("side", "seed", "trained")}
    out["optimizer_kib"] = round(row["optimizer_bytes"] / 1024)
    out["temp_mib"] = None if temp is None else round(temp / 2**20, 1)
    out |= {name: round(row[name]) for name in ("rss_mib", "peak_mib")}
    return out | {name: round(row[name], 4) for name in ("seconds", "loss", "held_out")}


if __name__ == "__main__":
    main()
