"""Trains the embedded models on the Python standard library's sources: `tinycode` (target) and its draft model.

    python scripts/train_tiny.py --model target --out runs/target
    python scripts/train_tiny.py --model draft --out runs/draft

A finished model goes on with `--init`: first with windows in which a stretch of code stands twice or more, so that it
learns to repeat what it was given (drafters that copy need a target that does), then on plain code again, without which
it would loop. The shipped target is what came of

    python scripts/train_tiny.py --model target --out runs/copies --steps 600 --stop 391 \\
        --init runs/target/export --copies 0.4 --rate 0.003
    python scripts/train_tiny.py --model target --out runs/plain --steps 130 --decay 0.85 \\
        --init runs/copies/export --rate 0.0016

Cost and result: scripts/results/train_tiny-*.json and the model cards in jaxinfer/assets hold what was measured. An
update sees 4,096 tokens and takes one core of 2024 about 4 seconds for the target and 0.8 for the draft; to train both
at once, give each `--threads 1`. Expect 1.17 bits per byte of held-out text for the target, 1.10 after the commands
above.

Started again, the same command goes on from its last checkpoint, also with another `--steps` as long as the learning
rate has not begun to fall (the last `--decay` of the steps). SIGTERM saves and exits with 75. At the end, or with
`--export-only`, the model is written to `--export` in Hugging Face format (bf16) with its model card.

Stability: experimental.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

TOKENS = 4096  # a batch
SHARES = ((256, 0.5, 0.7), (512, 0.35, 0.9), (1024, 0.1, 1.0), (2048, 0.05, 1.0))  # length, share, modules' weight
SHARES_COPIES = ((512, 0.6, 0.9), (1024, 0.4, 0.9))  # of a run with `--init`
MAX_LENGTH = 2048
PROMPTS = ('def read_json(path):\n    """', "class Stack:\n    def __init__(self):\n")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What differs between the two models."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    steps: int
    decay: float = 0.65
    rate: float = 5e-3


MODELS = {
    "target": Shape("tinycode", 256, 8, 8, 4, 768, steps=1250),
    "draft": Shape("tinycode-draft", 192, 2, 6, 3, 576, steps=900),
}


def make_step(model: str):
    """The model as a `Step`."""
    from jaxinfer.models.config import ModelConfig
    from jaxinfer.models.step import Step

    shape = MODELS[model]
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=32,
        mlp_size=shape.mlp_size,
        max_length=MAX_LENGTH,
        tie_embeddings=True,
        bos=0,
        eos=(0,),
    )
    return Step(config)


def make_recipe(
    model: str, *, steps: int, decay: float, rate: float, seed: int, copies: float, init: str | None, corpus, tokenizer
):
    """The recipe of one model: packed windows that grow with the run, Muon, and a glance at held-out text."""
    from jaxinfer.train import data, lm, loop

    step = make_step(model)
    modules, tests = (data.concatenate(data.encode(tokenizer, part)) for part in (corpus.modules, corpus.tests))
    stages = lm.stages(SHARES_COPIES if init else SHARES, steps=steps, tokens=TOKENS)
    stream = data.Stream(modules, tests, stages, seed, copies=copies)
    glance = corpus.held_out[::6]
    glance_tokens, glance_bytes = data.encode(tokenizer, glance), sum(document.num_bytes for document in glance)

    def evaluate(params):
        options = {"num_bytes": glance_bytes, "window": 512, "stride": 512}
        first, again = lm.losses_of_copies(step, params, glance_tokens)
        bits = lm.bits_per_byte(step, params, glance_tokens, **options)
        return {"bits_per_byte": bits, "loss_first": first, "loss_again": again}

    schedule = lm.warmup_stable_decay(rate, steps=steps, warmup=min(50, steps // 10), decay=decay)
    return loop.Recipe(
        objective=lm.NextToken(step),
        data=lambda i: lm.split_batch(stream(i), 2),  # smaller activations, which stay nearer to the core
        optimizer=lm.muon(schedule),
        schedule=schedule,
        evaluate=evaluate,
        tokens=lambda batch: batch["ids"].size,
        accumulate=2,
        identity={
            "model": model,
            "seed": seed,
            "corpus": corpus.digest(),
            "tokens": TOKENS,
            "copies": copies,
            "init": init,
        },
    )


def export(model: str, params: Any, folder: Path, out: Path, *, corpus, tokenizer, results: Path, command: str) -> None:
    """Writes the model, measures what was written (bf16) on all held-out text, and writes card and results."""
    import shutil

    import jaxinfer
    from jaxinfer.measure.results import Results
    from jaxinfer.models.hf import load_directory, save_directory
    from jaxinfer.train import data, lm, metrics

    step = make_step(model)
    data.save_tokenizer(tokenizer, out / "tokenizer", max_length=MAX_LENGTH)
    save_directory(step.config, params, folder, dtype="bfloat16", tokenizer_from=out / "tokenizer")
    _, shipped = load_directory(folder)
    held_out = data.encode(tokenizer, corpus.held_out)
    size = sum(document.num_bytes for document in corpus.held_out)
    rows = [row for row in metrics.read(out / "metrics.jsonl") if "loss" in row]
    found = {
        "model": MODELS[model].name,
        "bits_per_byte": round(lm.bits_per_byte(step, shipped, held_out, num_bytes=size), 4),
        "held_out_modules": len(corpus.held_out),
        "held_out_bytes": size,
        "corpus": corpus.digest(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "parameters": sum(leaf.size for leaf in _leaves(params)),
        "updates": rows[-1]["step"],
        "training_tokens": rows[-1]["total_tokens"],
        "hours": round(rows[-1]["total_seconds"] / 3600, 2),
        "command": command,
    }
    lm_ = jaxinfer.load(str(folder))
    samples = [(prompt, lm_.generate(prompt, max_tokens=80, temperature=0.0).text) for prompt in PROMPTS]
    (folder / "README.md").write_text(model_card(found, samples))
    if (out / "curve.png").exists():
        shutil.copyfile(out / "curve.png", folder / "curve.png")
    kept = Results(
        f"train_tiny-{model}", results, settings={"tokens": TOKENS, "stages": SHARES, "after": SHARES_COPIES}
    )
    kept.add(**found)
    print(f"{found['bits_per_byte']} bits per byte; wrote {folder} and {kept.save()}")


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)


def model_card(found: dict[str, Any], samples: list[tuple[str, str]]) -> str:
    """README.md of the exported folder, from measured numbers."""
    shown = "\n".join(f"```python\n{prompt}{text}\n```\n" for prompt, text in samples)
    return f"""---
license: apache-2.0
language: code
library_name: jaxinfer
pipeline_tag: text-generation
---
# {found["model"]}

A Llama-type language model of {found["parameters"] / 1e6:.1f}M parameters (bf16, a byte-pair vocabulary of 4,096) that
writes Python in the manner of the standard library. It is a small real model for measuring and testing; its code is
not to be trusted. Made by `scripts/train_tiny.py` of jaxinfer:

    {found["command"]}

- Corpus: the `.py` files of the standard library of Python {found["python"]} (digest {found["corpus"]}). Modules train
  the tokenizer and the model; test folders are further training text for the model. Sorted by path, modules number 0,
  10, 20, ... are held out: {found["held_out_modules"]} files of {found["held_out_bytes"]:,} bytes.
- Cost: {found["updates"]:,} updates, {found["training_tokens"]:,} tokens, {found["hours"]} hours on a shared CPU.
- Held-out text: **{found["bits_per_byte"]:.3f} bits per byte**, measured on these bf16 weights in float32, file by
  file, in windows of 1,024 tokens of which all but the first score their last 512 or fewer; each byte counts once.
- Context: trained on windows of 256 tokens, then 512, 1,024 and, for the last 5 % of the updates, {MAX_LENGTH:,}.
- Licence: Apache-2.0 for the weights. The corpus is under the Python Software Foundation License Version 2.

Two prompts continued greedily:

{shown}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, metrics and the curve")
    parser.add_argument("--export", type=Path, help="folder of the finished model (default: OUT/export)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, help="updates in all (default: the shipped model's)")
    parser.add_argument(
        "--init", help="go on from this model's weights (a folder, or a packaged name), not from random ones"
    )
    parser.add_argument("--copies", type=float, default=0.0, help="share of windows in which a stretch stands twice")
    parser.add_argument("--rate", type=float, help="peak learning rate (default: the shipped model's)")
    parser.add_argument("--stop", type=int, help="end after so many updates of a schedule of --steps")
    parser.add_argument("--decay", type=float, help="share of the updates over which the learning rate falls to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a core)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint, train nothing")
    args = parser.parse_args(argv)
    if args.threads is not None:
        os.environ["PJRT_NPROC"] = str(args.threads)  # read once, when jax makes its CPU client

    import jax

    import jaxinfer
    from jaxinfer.train import data, lm, loop, metrics

    shape = MODELS[args.model]
    steps, decay = args.steps or shape.steps, shape.decay if args.decay is None else args.decay
    corpus = data.standard_library()
    tokenizer = data.train_tokenizer([document.text for document in corpus.modules])
    recipe = make_recipe(
        args.model, steps=steps, decay=decay, rate=args.rate or shape.rate, seed=args.seed, copies=args.copies,
        init=args.init, corpus=corpus, tokenizer=tokenizer,
    )  # fmt: skip
    if args.init:
        params = jaxinfer.load(args.init, dtype="float32").params
    else:
        params = lm.init_params(make_step(args.model), jax.random.key(args.seed))
    state = loop.init_state(params, recipe, jax.random.key(args.seed + 1))
    if args.export_only:
        state = loop.Checkpoints(args.out / "checkpoints", identity=recipe.identity).restore(state)
        metrics.draw_curve(args.out / "metrics.jsonl", args.out / "curve.png")
    else:
        config = loop.LoopConfig(steps=args.stop or steps, save_seconds=240, evaluate_every=100)
        try:
            state = loop.train(recipe, state, config, args.out, resume=args.resume)
        except loop.Preempted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(loop.EXIT_PREEMPTED)
    options = f"--steps {int(state.step)} --decay {decay}"
    if args.init:
        options += f" --init {args.init} --copies {args.copies} --rate {args.rate or shape.rate}"
    command = f"python scripts/train_tiny.py --model {args.model} --out runs/{args.out.name} {options}"
    export(
        args.model,
        state.params,
        args.export or args.out / "export",
        args.out,
        corpus=corpus,
        tokenizer=tokenizer,
        results=args.results,
        command=command,
    )


if __name__ == "__main__":
    main()
