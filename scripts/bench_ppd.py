"""PPD on held-out code: acceptance by depth and rank, trees for this machine, tokens a forward and wall-clock.

    python scripts/bench_ppd.py                      # the shipped prompt tokens; about four minutes of two cores
    python scripts/bench_ppd.py --head runs/ppd --models tiny --counts

For tinycode and its 100M widening (the same function at a real cost): the latency of a forward by its slots, the size
that `ppd_tree.best_slots` picks by it, and for that size and the asked ones the tokens a forward beside what the tree
predicts, whether the output equals plain decoding's, and the speed-up over it in the same interleaved run. `--counts`
leaves wall-clock out (sizes as asked): counts hold on a busy machine too.

Writes scripts/results/bench_ppd-<device>.json and prints a table.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_decode import held_out_prompts, widen

import jaxinfer
from jaxinfer import decode, measure
from jaxinfer.decode import PPD, Autoregressive, Chooser
from jaxinfer.decode.ppd import SIZES
from jaxinfer.decode.ppd_tree import best_slots, choose_trees, rate
from jaxinfer.train import ppd

COLUMNS = ("model", "slots", "chosen", "tokens_per_forward", "predicted", "speedup", "equal")


def curve_of(head: Any, step: Any, params: Any, capacity: int) -> measure.LatencyCurve:
    """Seconds of a forward by its slots, one row."""
    widest = PPD(head, slots=max(SIZES))
    sizes = tuple(size for size in SIZES if size <= widest.width)
    return Chooser.measured(widest, step, params, batch=1, capacity=capacity, sizes=sizes).target


def runner(step: Any, params: Any, prompts: jax.Array, tokens: int, drafter: Any, own: Any):
    """A callable that decodes the prompts one by one."""
    config = decode.Config(max_tokens=tokens, eos=(), drafter=drafter)
    options = decode.compiler_options()
    generate = jax.jit(decode.generate, static_argnames=("step", "config"), compiler_options=options)
    length, key = jnp.full(1, prompts.shape[1], jnp.int32), jax.random.key(0)

    def run():
        return [generate(step, params, row[None], length, config=config, key=key, draft_params=own) for row in prompts]

    return run


def rows_of(name: str, step: Any, params: Any, draft: Any, prompts: jax.Array, options: Any) -> list[dict[str, Any]]:
    """A row for each size, plain decoding beside it."""
    head, acceptance = draft.head, draft.head.acceptance
    sizes, curve, chosen = {int(size) for size in options.slots.split(",")}, None, 0
    if not options.counts:
        curve = curve_of(head, step, params, prompts.shape[1] + options.tokens)
        chosen, gain = best_slots(acceptance, curve, SIZES, head.copies)
        print(f"{name}: {chosen} slots by the curve of this machine, {gain:.2f} times plain predicted")
        sizes |= {chosen} - {0}
    calls = {0: runner(step, params, prompts, options.tokens, Autoregressive(), None)}
    for size in sorted(sizes):
        calls[size] = runner(step, params, prompts, options.tokens, PPD(head, slots=size), draft.params)
    results = {size: call() for size, call in calls.items()}
    plain = np.concatenate([result.tokens for result in results[0]])
    timings = None
    if not options.counts:
        timings = measure.interleaved({str(size): call for size, call in calls.items()}, rounds=options.rounds)
    found = []
    for size in sorted(sizes):
        stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[result.stats for result in results[size]])
        trees = choose_trees(acceptance, size, head.copies)
        row = {
            "model": name,
            "slots": size,
            "chosen": size == chosen,
            "tokens_per_forward": round(float(stats.tokens_per_forward), 3),
            "predicted": round(rate(trees, acceptance), 3),
            "acceptance_by_depth": [round(float(x), 4) for x in stats.acceptance_by_depth],
            "guesses": [len(tree.parent) for tree in trees],
            "equal": int((np.concatenate([r.tokens for r in results[size]]) == plain).all(1).sum()),
            "prompts": len(plain),
        }
        if timings is not None and curve is not None:
            row["speedup"] = round(timings["0"].median / timings[str(size)].median, 3)
            row["curve"] = dict(zip(map(str, curve.sizes), curve.seconds, strict=True))
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="tinycode-ppd", help="packaged head, or its folder")
    parser.add_argument("--model", default="tinycode", help="the target of the head")
    parser.add_argument("--models", default="tiny,wide", help="which of tiny and wide to run")
    parser.add_argument("--slots", default="4,12,32", help="sizes to run beside the one that the curve picks")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts")
    parser.add_argument("--counts", action="store_true", help="no timing")
    options = parser.parse_args()
    lm = jaxinfer.load(options.model, dtype="float32", draft=options.head)
    draft: Any = lm.draft
    results = measure.Results("bench_ppd", settings=vars(options))
    prompts = held_out_prompts(lm.tokenizer.encode, options.prompts, options.prompt_tokens)
    held_out = ppd.measure_acceptance(
        lm.step, lm.params, draft.head, draft.params, list(np.asarray(prompts)), tokens=options.tokens
    )
    results.add(model="tiny", acceptance=draft.head.acceptance, held_out=held_out)
    for depth, row in enumerate(held_out, 1):
        print(f"acceptance on held-out code at depth {depth}, by rank: {' '.join(f'{x:.3f}' for x in row)}")
    models = {"tiny": (lm.step, lm.params), "wide": widen(lm.step, lm.params, 100_000_000)}
    for name in options.models.split(","):
        for row in rows_of(name, *models[name], draft, prompts, options):
            results.add(**row)
        results.save()
    print(measure.text_table(results.rows[1:], COLUMNS))
    print(f"written: {results.save()}")


if __name__ == "__main__":
    main()
