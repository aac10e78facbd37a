"""TriLM beside a float model: the same shape, data, optimiser and number of updates; then both as they would be run.

    python scripts/bench_trilm.py                    # about 8 minutes on 2 cores; a killed run goes on where it was
    python scripts/bench_trilm.py --steps 40 --out runs/trilm-quick

Trains a model of tinycode-draft's shape on the standard library twice, in float32 and with three values a matrix
(train/trilm.py), and measures on held-out modules: bits per byte of the float model, of the float model rounded to
three values afterwards (the control), and of the exported ternary model through the ternary product; bytes of the
weights, values a matrix, and the time of a decoding step at batch 1, interleaved.

Writes scripts/results/bench_trilm-<device>.json and prints a table.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_tiny import MAX_LENGTH, TOKENS, make_step

from jaxinfer import measure, ops
from jaxinfer.quant.tree import leaves
from jaxinfer.train import data, lm, loop, trilm

ROOT = Path(__file__).parent.parent
COLUMNS = ("weights", "bits_per_byte", "megabytes", "layer_megabytes", "values_a_matrix", "step_ms", "speedup")
SHARES = ((256, 1.0, 0.8),)
RATE = 4e-3
CAPACITY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="updates of each model")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of the timing; medians count")
    parser.add_argument("--out", type=Path, default=Path("runs/trilm"), help="folder of checkpoints and metrics")
    parser.add_argument("--results", default=str(ROOT / "scripts/results"), help="folder of the results file")
    options = parser.parse_args()
    step = make_step("draft")
    corpus = data.standard_library()
    tokenizer = data.train_tokenizer([document.text for document in corpus.modules])
    trained = {
        name: train(name, step, corpus, tokenizer, options.steps, options.out / name) for name in ("float", "ternary")
    }
    models = {
        "float32": trained["float"],
        "float32, rounded afterwards": trilm.export(trained["float"]),
        "ternary (TriLM)": trilm.export(trained["ternary"]),
    }
    held_out = corpus.held_out[::6]
    tokens, size = data.encode(tokenizer, held_out), sum(document.num_bytes for document in held_out)
    timings = measure.interleaved(
        {name: decoding_step(step, params) for name, params in models.items()}, rounds=options.rounds, min_seconds=0.05
    )
    results = measure.Results("bench_trilm", options.results, settings={"steps": options.steps, "tokens": TOKENS})
    for name, params in models.items():
        results.add(
            weights=name,
            bits_per_byte=lm.bits_per_byte(step, params, tokens, num_bytes=size),
            megabytes=nbytes(params) / 1e6,
            layer_megabytes=nbytes({k: v for k, v in params.items() if k.startswith("layers")}) / 1e6,
            values_a_matrix=most_values(params),
            step_ms=1e3 * timings[name].median,
            speedup=measure.speedup(timings["float32"], timings[name]).median,
        )
    path = results.save()
    print(measure.text_table(results.rows, COLUMNS))
    print(f"written: {path}")


def train(name: str, step: Any, corpus: data.Corpus, tokenizer: Any, steps: int, folder: Path) -> Any:
    """The params of one model after `steps` updates; both see the same batches under the same optimiser."""
    modules, tests = (data.concatenate(data.encode(tokenizer, part)) for part in (corpus.modules, corpus.tests))
    rate = trilm.schedule(RATE, steps=steps, warmup=min(50, steps // 4))
    recipe = loop.Recipe(
        objective={"float": lm.NextToken, "ternary": trilm.TernaryNextToken}[name](step),
        data=data.Stream(modules, tests, lm.stages(SHARES, steps=steps, tokens=TOKENS), 0),
        optimizer=trilm.optimizer(rate, steps=steps),
        schedule=rate,
        tokens=lambda batch: batch["ids"].size,
        identity={"model": name, "steps": steps, "corpus": corpus.digest(), "rate": RATE},
    )
    state = loop.init_state(lm.init_params(step, jax.random.key(0)), recipe, jax.random.key(1))
    return loop.train(recipe, state, loop.LoopConfig(steps=steps, save_seconds=60), folder).params


def decoding_step(step: Any, params: Any) -> Any:
    """One token of one row against a cache of `CAPACITY` tokens, logits included, compiled."""
    run = jax.jit(functools.partial(_forward, step))
    cache = step.new_cache(1, min(CAPACITY, MAX_LENGTH))
    token = jnp.ones((1, 1), jnp.int32)
    return lambda: run(params, cache, token)


def _forward(step: Any, params: Any, cache: Any, token: jax.Array) -> jax.Array:
    output, _ = step(params, token, jnp.zeros_like(token), cache, None)
    return step.head(params, output.hidden)


def nbytes(params: Any) -> int:
    """Bytes of all that is stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def most_values(params: Any) -> int:
    """The most different values in one matrix of the layers."""
    matrices = [leaf for path, leaf in leaves(params) if path.startswith("layers") and len(leaf.shape) == 2]
    return max(len(np.unique(np.asarray(ops.materialize(leaf)))) for leaf in matrices)


if __name__ == "__main__":
    main()
