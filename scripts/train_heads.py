"""Trains the packaged draft heads of tinycode and writes each with its model card: Medusa, EAGLE, Chimera.

    python scripts/train_heads.py --kind medusa --out runs/heads/medusa
    python scripts/train_heads.py --kind eagle --out runs/heads/eagle
    python scripts/train_heads.py --kind chimera --out runs/heads/chimera

The text is the standard library's, as for tinycode, a tenth of it held out. Cost: 5 to 10 minutes of one core each on
a quiet machine. A killed run goes on when the same command is given again. At the end (or with `--export-only`) the
head is written to `--export` in bf16, and measured there: greedy answers to prompts from held-out files, beside plain
decoding, whose output they must equal. scripts/results/train_heads-*.json holds what was measured.

Stability: experimental.
"""

import argparse
import os
from pathlib import Path
from typing import Any

KINDS = {  # what is shipped: under 1 MB each in bf16
    "medusa": {"heads": 3},
    "eagle": {"num_heads": 8, "num_kv_heads": 4, "mlp_size": 192},
    "chimera": {"num_heads": 8, "num_kv_heads": 1, "mlp_size": 48},
}
LENGTH, TOKENS = 256, 1024
PROMPTS, PROMPT, ANSWER = 24, 96, 64


def measure(lm: Any, text: Any) -> dict[str, Any]:
    """Tokens a forward and acceptance by depth on held-out code, batch 1's worth of greedy answers; and whether they
    equal the plain ones."""
    import jax
    import numpy as np

    from jaxinfer import decode

    chosen = [d for d in text.held_out if len(d) > 3 * PROMPT][:PROMPTS]
    prompts = np.stack([d[len(d) // 2 :][:PROMPT] for d in chosen]).astype(np.int32)
    lengths = np.full(len(prompts), PROMPT, np.int32)
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    drafter = lm.default_drafter()

    def run(drafter):
        config = decode.Config(max_tokens=ANSWER, drafter=drafter, eos=())
        return generate(
            lm.step, lm.params, prompts, lengths, config=config, key=jax.random.key(0),
            draft_params=lm.draft_params_for(drafter),
        )  # fmt: skip

    plain, drafted = run(decode.Autoregressive()), run(drafter)
    same = np.asarray(plain.tokens) == np.asarray(drafted.tokens)
    return {
        "drafter": type(drafter).__name__,
        "slots": drafter.width + 1,
        "prompts": len(prompts),
        "tokens_per_forward": round(float(drafted.stats.tokens_per_forward), 3),
        "acceptance_by_depth": [round(float(x), 3) for x in drafted.stats.acceptance_by_depth],
        "equal_answers": int(same.all(1).sum()),
    }


def model_card(found: dict[str, Any], command: str) -> str:
    """README.md of the exported folder, from measured numbers."""
    by_depth = ", ".join(f"{x:.2f}" for x in found["acceptance_by_depth"])
    return f"""---
license: apache-2.0
library_name: jaxinfer
---
# tinycode-{found["kind"]}

A draft head of kind `{found["kind"]}` ({found["parameters"] / 1e6:.2f}M parameters, bf16) trained on the frozen
`tinycode`; it drafts for that model alone. Made by `scripts/train_heads.py` of jaxinfer:

    {command}

Use: `jaxinfer generate --drafter {found["kind"]} --prompt "def quicksort(xs):"`.

- Settings: {found["settings"]}.
- Cost: {found["updates"]:,} updates, {found["training_tokens"]:,} tokens, {found["minutes"]:.0f} minutes on a shared
  CPU.
- Held-out code ({found["prompts"]} prompts of {PROMPT} tokens, greedy answers of {ANSWER}):
  **{found["tokens_per_forward"]:.2f} tokens a forward** of {found["slots"]} slots; of the drafts at each depth the
  target kept {by_depth}; {found["equal_answers"]} of {found["prompts"]} answers equal plain decoding's.
- Licence: Apache-2.0 for the weights. The corpus is under the Python Software Foundation License Version 2.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(KINDS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, metrics and the curve")
    parser.add_argument("--export", type=Path, help="folder of the finished head (default: OUT/export)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=500, help="updates in all, of 1,024 tokens")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--rounds", type=int, default=3, help="rounds on its own output, of eagle and chimera")
    parser.add_argument("--distill", type=float, default=1.0, help="weight of the target's own law")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a core)")
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint, train nothing")
    args = parser.parse_args(argv)
    if args.threads is not None:
        os.environ["PJRT_NPROC"] = str(args.threads)  # read once, when jax makes its CPU client

    import jax

    import jaxinfer
    from jaxinfer.measure.results import Results
    from jaxinfer.models.heads import TargetShape, head_class, save_head
    from jaxinfer.train import heads, lm, loop, metrics
    from jaxinfer.train import text as texts

    model = jaxinfer.load("tinycode", dtype="float32")
    text = texts.load(None, model.tokenizer, vocab_size=model.step.vocab_size)
    head: Any = head_class(args.kind)(TargetShape.of(model.config), **KINDS[args.kind])
    stream = text.stream(lm.stages([(LENGTH, 1.0, 0.9)], steps=args.steps, tokens=TOKENS), seed=args.seed, copies=0.2)
    recipe = heads.recipe(
        model.step, model.params, head, stream, steps=args.steps, rate=args.rate,
        losses=heads.Losses(distill=args.distill, rounds=args.rounds),
        held_out=heads.held_out_batch(text.held_out, length=LENGTH, end=text.end),
        identity={"text": text.digest, "seed": args.seed, "target": loop.fingerprint(model.params)},
    )  # fmt: skip
    state = heads.init_state(model.step, model.params, head, recipe, jax.random.key(args.seed))
    if args.export_only:
        checkpoints = loop.Checkpoints(args.out / "checkpoints", identity=recipe.identity)
        state = checkpoints.restore(state)
        checkpoints.close()
    else:
        config = loop.LoopConfig(steps=args.steps, save_seconds=60.0, evaluate_every=100, log_every=10)
        state = loop.train(recipe, state, config, args.out)
    folder = args.export or args.out / "export"
    save_head(folder, head, state.params, model.params)
    rows = [row for row in metrics.read(args.out / "metrics.jsonl") if "total_seconds" in row]
    command = f"python scripts/train_heads.py --kind {args.kind} --steps {args.steps}"
    found = {
        "kind": args.kind,
        "settings": ", ".join(f"{name} {value}" for name, value in head.settings().items()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "updates": int(state.step),
        "training_tokens": int(state.step) * TOKENS,
        "minutes": round(rows[-1]["total_seconds"] / 60, 1),
        **measure(jaxinfer.load("tinycode", dtype="float32", draft=folder), text),
    }
    (folder / "README.md").write_text(model_card(found, command))
    kept = Results(f"train_heads-{args.kind}", args.results, settings={"tokens": TOKENS, "length": LENGTH})
    kept.add(**found)
    print(f"{found['tokens_per_forward']} tokens a forward; wrote {folder} and {kept.save()}")


if __name__ == "__main__":
    main()
