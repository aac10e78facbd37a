"""Greedy decoding beside transformers: tokens a second at several batch sizes, on one model and in one run.

    python scripts/bench_decode.py                  # tinycode and its 100M widening; about 15 minutes on 2 cores
    python scripts/bench_decode.py --models tiny --batches 1 --tokens 64

The peer is `transformers.generate` in float32 on torch's CPU build with every core, once with its default (dynamic)
cache, once with its static cache, and once with the static cache and a compiled forward; its fastest setting at each
batch size is the one that counts. The wide model is tinycode with more MLP units whose down-projection rows are
zero: the same function, so the same tokens, at the cost of 100M parameters. Both sides decode the same held-out
prompts to the same length, prefill included; the greedy outputs are compared.

Writes scripts/results/bench_decode-<device>.json and prints a table. Needs the `peers` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfer
from jaxinfer import decode, measure
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.hf import save_directory
from jaxinfer.train.data import standard_library

COLUMNS = ("model", "batch", "ours_tok_s", "peer_tok_s", "ratio", "peer_setting", "ours_share", "peer_share", "equal")


def widen(step: Step, params: Any, total: int) -> tuple[Step, Any]:
    """The same function with about `total` parameters: random new MLP units whose down rows are zero."""
    config = step.config
    have = sum(leaf.size for leaf in jax.tree.leaves(params))
    extra = max(0, total - have) // (3 * config.hidden_size * config.num_layers) // 64 * 64
    key = jax.random.key(0)
    wide = dict(params)
    for i in range(config.num_layers):
        mlp = dict(params[f"layers_{i}"]["mlp"])
        for name in ("gate", "up"):
            key, own = jax.random.split(key)
            new = 0.02 * jax.random.normal(own, (config.hidden_size, extra))
            mlp[name] = jnp.concatenate([mlp[name], new.astype(mlp[name].dtype)], 1)
        mlp["down"] = jnp.pad(mlp["down"], ((0, extra), (0, 0)))
        wide[f"layers_{i}"] = {**params[f"layers_{i}"], "mlp": mlp}
    config = dataclasses.replace(config, mlp_size=config.mlp_size + extra)
    return dataclasses.replace(step, config=config), wide


def held_out_prompts(encode, count: int, length: int) -> jax.Array:
    """The first `length` tokens of held-out modules, `i32[count, length]`."""
    rows = []
    for document in standard_library().held_out:
        ids = encode(document.text)
        rows += [ids[start : start + length] for start in range(0, len(ids) - length, 4 * length)]
        if len(rows) >= count:
            return jnp.asarray(rows[:count], jnp.int32)
    raise SystemExit(f"the held-out modules have only {len(rows)} prompts of {length} tokens, {count} are needed")


def our_runs(step: Step, params, prompts: jax.Array, tokens: int):
    """A callable that decodes `prompts` greedily and returns i32[B, tokens]."""
    config = decode.Config(max_tokens=tokens, eos=())
    options = decode.compiler_options()
    generate = jax.jit(decode.generate, static_argnames=("step", "config"), compiler_options=options)
    lengths = jnp.full(prompts.shape[0], prompts.shape[1], jnp.int32)
    key = jax.random.key(0)
    return lambda: generate(step, params, prompts, lengths, config=config, key=key).tokens


def peer_runs(folder: Path, prompts: jax.Array, tokens: int) -> dict[str, Any]:
    """transformers' settings: name -> callable that returns an int array [B, tokens]."""
    import torch
    import transformers

    torch._dynamo.reset()  # else it stops compiling after eight forms, and the later batch sizes would run uncompiled
    ids = torch.from_numpy(np.asarray(prompts).astype(np.int64))
    mask = torch.ones_like(ids)
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(model, **extra):
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, **options, **extra)[:, ids.shape[1] :].numpy()

    plain, compiled = load(), load()
    compiled.forward = torch.compile(compiled.forward, dynamic=False)
    return {
        "dynamic": lambda: run(plain),
        "static": lambda: run(plain, cache_implementation="static"),
        "static+compile": lambda: run(compiled, cache_implementation="static"),
    }


def fastest(settings: dict[str, Any]) -> tuple[str, Any]:
    """The peer's best setting: each warmed twice, then the better of two calls. A setting that fails is reported."""
    seconds = {}
    for name, call in settings.items():
        try:
            for _ in range(2):  # compilation, and what generate sets up on its second call
                call()
            seconds[name] = min(_seconds(call) for _ in range(2))
        except Exception as error:  # a peer's own failure must not end the benchmark
            print(f"  transformers {name}: {type(error).__name__}: {str(error)[:120]}")
    print("  transformers:", ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items()))
    best = min(seconds, key=lambda name: seconds[name])
    return best, settings[best]


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_bytes(config: ModelConfig, params, batch: int, length: float) -> float:
    """Bytes that one decoding step must read: every weight once, and the keys and values of `length` tokens a row."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    return weights + batch * length * per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinycode", help="name or directory of the model")
    parser.add_argument("--models", default="tiny,wide", help="which of tiny and wide to run")
    parser.add_argument("--batches", default="1,8,64", help="batch sizes")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts")
    options = parser.parse_args()
    lm = jaxinfer.load(options.model, dtype="float32")
    limits = measure.limits()
    results = measure.Results("bench_decode", settings=vars(options) | {"limits": dataclasses.asdict(limits)})
    models = {"tiny": (lm.step, lm.params), "wide": widen(lm.step, lm.params, 100_000_000)}
    batches = [int(batch) for batch in options.batches.split(",")]
    prompts = held_out_prompts(lm.tokenizer.encode, max(batches), options.prompt_tokens)
    for name in options.models.split(","):
        step, params = models[name]
        with tempfile.TemporaryDirectory() as folder:
            save_directory(step.config, params, folder, dtype="float32")
            for batch in batches:
                print(f"{name}, batch {batch}:")
                row = compare(step, params, Path(folder), prompts[:batch], options, limits)
                results.add(model=name, batch=batch, **row)
        results.save()
    print(measure.text_table(results.rows, COLUMNS))
    print(f"written: {results.save()}")


def compare(step: Step, params, folder: Path, prompts: jax.Array, options, limits) -> dict[str, Any]:
    """One row: both sides on the same prompts, interleaved."""
    batch, length = prompts.shape
    ours = our_runs(step, params, prompts, options.tokens)
    setting, peer = fastest(peer_runs(folder, prompts, options.tokens))
    equal = float((np.asarray(ours()) == peer()).all(1).mean())
    timings = measure.interleaved({"ours": ours, "peer": peer}, rounds=options.rounds)
    ratio = measure.speedup(timings["peer"], timings["ours"])
    floor = step_bytes(step.config, params, batch, length + options.tokens / 2) * options.tokens
    share = {side: floor / timings[side].median / limits.bandwidth for side in timings}
    print(f"  ours {timings['ours'].median:.3f} s, transformers ({setting}) {timings['peer'].median:.3f} s: {ratio}")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "ours_tok_s": batch * options.tokens / timings["ours"].median,
        "peer_tok_s": batch * options.tokens / timings["peer"].median,
        "ratio": timings["peer"].median / timings["ours"].median,
        "peer_setting": setting,
        "ours_share": share["ours"],
        "peer_share": share["peer"],
        "equal": equal,
        "ours": timings["ours"].row(),
        "peer": timings["peer"].row(),
    }


if __name__ == "__main__":
    main()
