"""Training on long sequences: memory and time of SeCO and SpaCO beside backpropagation through the whole sequence.

    python scripts/bench_long.py                     # about 5 minutes on 2 cores
    python scripts/bench_long.py --no-times          # memory alone: compiles, runs nothing
    python scripts/bench_long.py --time-length 16384 --rounds 1

The gradient of the loss of one document, on tinycode in float32. Memory is what XLA needs besides arguments and results
(`memory_analysis` of the compiled program, which is not run); `kv_mb` of it are keys, values and their gradients, which
grow with the length. Rows:
  full   backpropagation in one piece, with the blocked attention of the chunks: scores of all pairs would be far worse
  flash  the same with the library's flash attention
  remat  `full`, with the inside of each layer computed again for its gradient (jax.checkpoint)
  seco   by chunks
  spaco  by chunks, of which the second pass visits an eighth; times are means over draws, one a round
Times are taken in turns at one length.

Writes scripts/results/bench_long-<device>.json and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfer
from jaxinfer import measure, ops
from jaxinfer.models import Step
from jaxinfer.models.decoder import DecoderLayer, Output
from jaxinfer.pallas_kernels.attention.flash import flash
from jaxinfer.train.chunkwise import Chunkwise, whole_loss
from jaxinfer.train.chunkwise_cache import Relay, RelayCache
from jaxinfer.train.chunkwise_sampling import Sampling

COLUMNS = ("row", "length", "temporary_mb", "kv_mb", "beside_mb", "full_over", "seconds", "over_full", "chunks")
SHARE = 8  # SpaCO visits one chunk in so many
GROWTH = "memory of seco beside keys and values, longest over shortest"
LIMITS = {"memory of full over seco": 10.0, GROWTH: 1.0, "time of seco over full": 1.35, "time of seco over spaco": 2.5}


@dataclasses.dataclass(frozen=True)
class Flash(Relay):
    """A `Relay` for one chunk that is the whole sequence: attention is the library's kernel, nothing is written."""

    def attend(self, state, block, q, positions, mask, table=None):
        spec = self.attention
        q, k = (spec.rotate(x, positions) for x in (q, block.k))
        out, lse = flash(q, k, block.v, causal=True, window=spec.window, softcap=spec.softcap, scale=spec.scale)
        return ops.Part(out, lse), state


@dataclasses.dataclass(frozen=True)
class WithFlash(Step):
    """A Step whose cache policy is `Flash`, whatever it is told."""

    def new_cache(self, batch: int, capacity: int):
        cache = super().new_cache(batch, capacity)
        return dataclasses.replace(cache, specs=tuple(Flash(**_fields(spec)) for spec in cache.specs))


@dataclasses.dataclass(frozen=True)
class Rematerialised(Step):
    """A Step of equal layers that keeps only what goes between them.

    The layers are one scan: XLA's CPU compiler shares a layer's second computation with the first where it sees both.
    """

    def __call__(self, params, inputs, positions, cache=None, block=None, at=0, mask=None, *, taps=()):
        assert cache is not None and len(set(cache.specs)) == 1
        spec, state, config = cache.specs[0], cache.states[0], self.config
        layer, own = DecoderLayer(config, layer=0), spec.new_block(*inputs.shape)

        @jax.checkpoint
        def run(x, params):
            return layer.apply({"params": params}, x, positions, spec, state, own, 0, mask, None)[0], None

        layers = [params[f"layers_{i}"] for i in range(config.num_layers)]
        x, _ = jax.lax.scan(run, self.embed(params, inputs), jax.tree.map(lambda *xs: jnp.stack(xs), *layers))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * params["final_norm"]
        return Output(x), None


def _fields(spec: Relay) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def other(step: Step, kind: type[Step]) -> Step:
    """The same model as another kind of Step."""
    return kind(step.config, RelayCache(), step.dtype)


def programs(step: Step, chunk: int, length: int) -> dict[str, Callable]:
    """Name -> `(params, batch, key) -> (gradients, chunks visited)`."""
    chunks = -(-length // chunk)

    def whole(step):
        return lambda params, batch, key: (jax.grad(whole_loss, 1)(Chunkwise(step, chunk), params, batch), 1.0 * chunks)

    def parts(sampling):
        objective = Chunkwise(step, chunk, sampling)

        def run(params, batch, key):
            grads, metrics = jax.grad(objective, has_aux=True)(params, batch, key)
            return grads, metrics.get("chunks", 1.0 * chunks)

        return run

    return {
        "full": whole(step),
        "flash": whole(other(step, WithFlash)),
        "remat": whole(other(step, Rematerialised)),
        "seco": parts(None),
        "spaco": parts(Sampling(max(1, chunks // SHARE))),
    }


def document(vocab_size: int, length: int) -> dict[str, np.ndarray]:
    """A batch of one row that is one document."""
    tokens = np.random.default_rng(0).integers(2, vocab_size, (1, length + 1)).astype(np.int32)
    place = np.arange(length, dtype=np.int32)[None]
    return {"ids": tokens[:, :-1], "targets": tokens[:, 1:], "positions": place, "segments": np.zeros_like(place)}


def compiled(step: Step, params, chunk: int, length: int, names) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (program, its row)."""
    c, batch, found = step.config, document(step.vocab_size, length), {}
    kv = 4 * c.num_layers * c.num_kv_heads * c.head_dim * length * 4
    for name in names:
        began = time.perf_counter()
        program = jax.jit(programs(step, chunk, length)[name]).lower(params, batch, jax.random.key(0)).compile()
        memory: Any = program.memory_analysis()  # None on backends that do not tell
        temporary = memory.temp_size_in_bytes
        by_chunks = name in ("seco", "spaco")
        row = {"row": name, "length": length, "temporary_mb": temporary / 1e6, "compile_s": time.perf_counter() - began}
        row |= {"kv_mb": kv / 1e6, "beside_mb": (temporary - kv) / 1e6} if by_chunks else {}
        found[name] = (program, row)
        print(f"  {name}, {length} tokens: {temporary / 1e6:.0f} MB, compiled in {row['compile_s']:.0f} s", flush=True)
    for name, (_, row) in found.items():
        if "full" in found:
            row["full_over"] = found["full"][1]["temporary_mb"] / found[name][1]["temporary_mb"]
    return found


def timed(found: dict[str, tuple[Any, dict]], params, batch, rounds: int) -> None:
    """Adds seconds, their ratio to full backpropagation, and the chunks visited, to the rows."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    visited: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(-1, rounds):  # the first warms up
        for name, (program, _) in found.items():
            began = time.perf_counter()
            visits = jax.block_until_ready(program(params, batch, jax.random.key(turn + 1)))[1]
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
                visited[name].append(float(visits))
    full = float(np.median(seconds["full"]))
    for name, (_, row) in found.items():
        middle = np.mean if name == "spaco" else np.median
        row |= {"seconds": float(middle(seconds[name])), "chunks": float(np.mean(visited[name]))}
        row |= {"over_full": row["seconds"] / full, "all_seconds": seconds[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinycode", help="name or directory of the model")
    parser.add_argument("--lengths", default="4096,16384,65536", help="of which the whole sequence: the first two")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk")
    parser.add_argument("--time-length", type=int, default=4096, help="where times are taken; one of the lengths")
    parser.add_argument("--rounds", type=int, default=6, help="interleaved rounds")
    parser.add_argument("--no-times", action="store_true", help="compile and run nothing")
    options = parser.parse_args()
    model = jaxinfer.load(options.model, dtype="float32")
    lengths = [int(length) for length in options.lengths.split(",")]
    results = measure.Results("bench_long", settings=vars(options) | {"limits": LIMITS})
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for i, length in enumerate(lengths):
        names = ("full", "flash", "remat", "seco", "spaco") if i < 2 else ("seco", "spaco")
        found = compiled(model.step, model.params, options.chunk, length, names)
        if length == options.time_length and not options.no_times:
            timed(found, model.params, document(model.step.vocab_size, length), options.rounds)
        for name, (_, row) in found.items():
            rows[name, length] = results.add(**row)
        results.save()
    print(measure.text_table(results.rows, COLUMNS))
    for claim, value in claims(rows, lengths, options.time_length).items():
        print(f"{claim}: {value:.2f} ({LIMITS[claim]} asked for)")
    print(f"written: {results.save()}")


def claims(rows: dict, lengths: list[int], timed_at: int) -> dict[str, float]:
    """The figures that are asked for, as far as they were measured."""
    found = {}
    if len(lengths) > 1:
        full, seco = (rows[name, lengths[1]]["temporary_mb"] for name in ("full", "seco"))
        found["memory of full over seco"] = full / seco
        found[GROWTH] = rows["seco", lengths[-1]]["beside_mb"] / rows["seco", lengths[0]]["beside_mb"]
    if "seconds" in rows.get(("seco", timed_at), {}):
        seconds = {name: rows[name, timed_at]["seconds"] for name in ("full", "seco", "spaco")}
        found["time of seco over full"] = seconds["seco"] / seconds["full"]
        found["time of seco over spaco"] = seconds["seco"] / seconds["spaco"]
    return found


if __name__ == "__main__":
    main()
