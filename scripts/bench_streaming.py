"""A model of 2 GB decodes under a budget of 600 MB: memory and tokens a second, beside the model in memory and beside
Hugging Face accelerate's disk offload.

    python scripts/bench_streaming.py --scratch FOLDER           # about two minutes on two quiet cores, 2 GB of disk
    python scripts/bench_streaming.py --scratch FOLDER --layers 6 --budget 150MB --tokens 4

A random float32 Llama is written to the scratch folder, and every side decodes the same prompt greedily in a process
of its own: `zero-layer` (embedding, norm and head alone: what the rest costs), `in-memory`, `streamed`
(`sharding.layer_stream`), and `accelerate` (transformers, `device_map="auto"` with the budget as the processor's
memory; only where it is installed). The parent reads RssAnon and RssFile of each from /proc while it runs.

A row a side: `anon_mb` and `file_mb`, the peaks; `above_zero_mb`, anonymous memory above that of `zero-layer`;
`tokens_per_s` of a second run; `same_tokens` as `in-memory`. File pages are the operating system's to take back.
Speeds depend on whether it holds the model's file in its cache, which it does here where memory allows.

Writes scripts/results/bench_streaming-<device>.json and prints a table. The aim: `streamed` within the budget and a
fifth above `zero-layer`, with the same tokens. A model of 2 GB took 327 MB above it, the window being file pages, which
`file_mb` shows. A forward more than tokens: a prompt's last token is a step of its own here, and not in transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("zero-layer", "in-memory", "streamed", "accelerate")
COLUMNS = ("side", "anon_mb", "file_mb", "above_zero_mb", "tokens_per_s", "same_tokens", "waited_s")
PROMPT = (1, 17, 93, 5, 41, 8, 260, 12)


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments)))
        return
    from jaxinfer import measure

    budget = size_of(arguments.budget)
    nbytes = write_model(model_directory(arguments), arguments.layers, arguments.hidden)
    settings = {"model_bytes": nbytes, "budget_bytes": budget, "layers": arguments.layers, "tokens": arguments.tokens}
    results = measure.Results("bench_streaming", str(ROOT / "scripts/results"), settings=settings)
    zero, expected = 0.0, None
    for side in arguments.sides.split(","):
        if side == "accelerate" and not all(map(importlib.util.find_spec, ("accelerate", "transformers", "torch"))):
            print("accelerate: not installed, left out", file=sys.stderr)
            continue
        found, anon, file = watched(arguments, side)
        zero = anon if side == "zero-layer" else zero
        expected = found["tokens"] if side == "in-memory" else expected
        same = None if side == "zero-layer" or expected is None else found["tokens"] == expected
        above = None if side == "zero-layer" or not zero else (anon - zero) / 1e6
        row = {"anon_mb": anon / 1e6, "file_mb": file / 1e6, "above_zero_mb": above, "same_tokens": same}
        results.add(side=side, **row, **{k: v for k, v in found.items() if k != "tokens"})
    print(measure.text_table(results.rows, COLUMNS))
    print(f"written: {results.save().relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder of the model; it stays there")
    parser.add_argument("--budget", default="600MB")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def size_of(text: str) -> int:
    from jaxinfer.cli.options import Streamed

    return Streamed(text).nbytes


def model_directory(arguments: argparse.Namespace) -> Path:
    return arguments.scratch / f"model-{arguments.layers}x{arguments.hidden}"


def write_model(directory: Path, layers: int, hidden: int) -> int:
    """A random model, written tensor by tensor unless it is there; bytes of its files."""
    from jaxinfer.models import ModelConfig, Step
    from jaxinfer.models.hf import save_directory

    config = ModelConfig(
        vocab_size=4096, hidden_size=hidden, num_layers=layers, num_heads=16, num_kv_heads=4, head_dim=hidden // 16,
        mlp_size=4 * hidden, max_length=256, tie_embeddings=True,
    )  # fmt: skip
    if not (directory / "config.json").is_file():
        import jax

        rng = np.random.default_rng(0)

        def random(leaf: Any) -> np.ndarray:
            if len(leaf.shape) == 1:
                return np.ones(leaf.shape, np.float32)
            return rng.standard_normal(leaf.shape, np.float32) * np.float32(leaf.shape[0] ** -0.5)

        shapes = jax.eval_shape(Step(config).init, jax.random.key(0))
        save_directory(config, jax.tree.map(random, shapes), directory, max_shard_size=2**29)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def watched(arguments: argparse.Namespace, side: str) -> tuple[dict[str, Any], float, float]:
    """What a side's process prints, and the peaks of its anonymous and its file-backed memory in bytes."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("scratch", "budget", "layers", "hidden", "tokens")]
    process = subprocess.Popen(
        [sys.executable, __file__, *options, "--child", side], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    peaks = {"RssAnon": 0.0, "RssFile": 0.0}
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024.0 * int(value.split()[0]))
        time.sleep(0.01)
    assert process.stdout is not None
    told = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} ended with code {process.returncode}")
    return json.loads(told.splitlines()[-1]), peaks["RssAnon"], peaks["RssFile"]


def decoded(step: Any, params: Any, count: int) -> dict[str, Any]:
    """Greedy tokens, and their speed in a second run of the same program."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import decode

    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    prompt, lengths = jnp.asarray([PROMPT], jnp.int32), jnp.asarray([len(PROMPT)])

    def run() -> list[int]:
        out = generate(step, params, prompt, lengths, config=decode.Config(max_tokens=count), key=jax.random.key(0))
        return np.asarray(out.tokens)[0].tolist()

    run()
    begun = time.perf_counter()
    tokens = run()
    return {"tokens": tokens, "tokens_per_s": count / (time.perf_counter() - begun)}


def zero_layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model without layers: they are skipped, and their weights are not read."""
    import dataclasses

    from jaxinfer.models import Step
    from jaxinfer.sharding.layer_stream import LayerFiles

    @dataclasses.dataclass(frozen=True)
    class ZeroLayer(Step):
        def __call__(self, params, inputs, positions, cache=None, block=None, at=0, mask=None, *, taps=()) -> Any:
            from jaxinfer.models.decoder import Decoder

            def skip(i: int, run: Any, x: Any, positions: Any, block: Any) -> Any:
                return x, block, None

            variables = {"params": params}
            return Decoder(self.config).apply(variables, inputs, positions, cache, block, at, mask, taps, skip)

    layers = LayerFiles(model_directory(arguments), budget=10**12)
    return decoded(ZeroLayer(layers.config), layers.resident(), arguments.tokens)


def in_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """All weights loaded, in the order that the streamed products read them."""
    from jaxinfer import quant
    from jaxinfer.models import Step
    from jaxinfer.models.hf import load_directory

    spec = quant.Transposed()

    def turned(path: str, array: Any) -> Any:
        return spec.quantize(array) if path.startswith("layers_") and array.ndim == 2 else array

    config, params = load_directory(model_directory(arguments), on_leaf=turned)
    return decoded(Step(config), params, arguments.tokens)


def streamed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The layers read from the files, token by token."""
    from jaxinfer.sharding.layer_stream import LayerFiles

    layers = LayerFiles(model_directory(arguments), budget=size_of(arguments.budget))
    found = decoded(layers.step(), layers.resident(), arguments.tokens)
    counts, window = layers.streamer.counts, layers.streamer.window
    layers.close()
    return found | {"window_layers": window, "read_bytes": counts.bytes, "waited_s": counts.waited}


def accelerate(arguments: argparse.Namespace) -> dict[str, Any]:
    """transformers with accelerate's hooks: modules beyond the budget are loaded from the files for each forward."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_directory(arguments),
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": size_of(arguments.budget)},
        offload_folder=str(arguments.scratch / "offload"),
    )
    prompt, count = torch.tensor([PROMPT]), arguments.tokens

    def run() -> list[int]:
        with torch.no_grad():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
                min_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        return out[0, len(PROMPT) :].tolist()

    run()
    begun = time.perf_counter()
    tokens = run()
    on_disk = sum(place == "disk" for place in model.hf_device_map.values())
    return {"tokens": tokens, "tokens_per_s": count / (time.perf_counter() - begun), "modules_on_disk": on_disk}


CHILDREN = {"zero-layer": zero_layer, "in-memory": in_memory, "streamed": streamed, "accelerate": accelerate}

if __name__ == "__main__":
    main()
