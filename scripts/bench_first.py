"""FiRST beside its controls: loss of answers where routers, chance or a fixed rule skips layers, with and without LoRA.

    jaxinfer train first --output runs/first --penalty 0.08 --steps 200
    python scripts/bench_first.py --first runs/first --control runs/first-control --steps 200

Held-out windows of 256 tokens, the first 96 of them the prompt. Each row: mean layers run, nats a token of the answers.
Controls skip as many layers as the routers did: in each row the same number by chance, or the same layers in all rows
(those that the routers skip most often; layers evenly spread). `--control` trains LoRA without routers as FiRST's own
were trained (same data, steps, rate; resumable, minutes of one core), since most of the paper's gain is LoRA's. Last,
decoding at batch 1 and 8: milliseconds a token beside the base model, to be believed on a quiet machine.
Takes about two minutes of one core without `--control`.

Stability: experimental.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

LENGTH, PROMPT, ANSWER = 256, 96, 64


def windows(documents, count: int, end: int) -> list[Any]:
    """Batches of 8 windows from the middle of held-out documents, as `train.first.answer_loss` reads them."""
    import numpy as np

    from jaxinfer.train.data import pack

    found = []
    for place in (0.5, 0.25, 0.75, 0.9):
        for tokens in documents:
            start = int(place * len(tokens))
            window = tokens[start : start + LENGTH + 1]
            if len(window) == LENGTH + 1 and not (window == end).any():
                found.append(window)
    found = np.stack(found[: count - count % 8])
    prompt = np.full(8, PROMPT, np.int32)
    return [{**pack(found[i : i + 8], end=end), "prompt": prompt} for i in range(0, len(found), 8)]


def train_control(lm, args: argparse.Namespace):
    """Params with LoRA adapters trained as FiRST's, but with every layer run."""
    import jax

    from jaxinfer import quant
    from jaxinfer.train import first, loop, text
    from jaxinfer.train import lm as recipes

    corpus = text.load(None, lm.tokenizer, vocab_size=lm.step.vocab_size)
    stream = corpus.stream(
        recipes.stages([(LENGTH, 1.0, 1.0)], steps=args.steps, tokens=args.batch_tokens), seed=args.seed
    )
    rules = [(r"layers_.*", quant.Lora(rank=args.rank))]
    trained, frozen = quant.split(quant.adapt(lm.params, rules, jax.random.key(args.seed)))
    schedule = recipes.warmup_stable_decay(
        args.rate, steps=args.steps, warmup=max(1, min(20, args.steps // 4)), decay=0.5
    )
    recipe = loop.Recipe(
        objective=first.Adapted(lm.step, (1,) * lm.config.num_layers), data=first.Prompted(stream, seed=args.seed),
        optimizer=recipes.muon(schedule), schedule=schedule, frozen=frozen,
        identity={"recipe": "first/control", "seed": args.seed, "rate": args.rate, "rank": args.rank},
    )  # fmt: skip
    state = loop.init_state(trained, recipe, jax.random.key(args.seed))
    state = loop.train(recipe, state, loop.LoopConfig(steps=args.steps, save_every=20), args.control)
    return quant.merge(quant.join(state.params, frozen))


def run(args: argparse.Namespace):
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxinfer
    from jaxinfer import decode, quant
    from jaxinfer.decode.first import load_first
    from jaxinfer.measure.results import Results
    from jaxinfer.train import data
    from jaxinfer.train.first import answer_loss

    lm = jaxinfer.load(args.target, dtype="float32")
    held_out = data.encode(lm.tokenizer.backend, data.standard_library().held_out)
    batches = windows(held_out, args.windows, lm.step.eos[0])
    first, both = load_first(lm.step, lm.params, args.first)
    both = quant.merge(both)
    routed = {**lm.params, "first": both["first"]}
    kept = Results(args.name, args.results, settings={"length": LENGTH, "prompt": PROMPT, "windows": 8 * len(batches)})
    score = jax.jit(functools.partial(answer_loss, lm.step))

    def measure(case: str, params, gates=None):
        """One row; `gates`: a decision for each batch, in place of the routers'."""
        found = [score(params, batch, None if gates is None else gates[i]) for i, batch in enumerate(batches)]
        rho = np.concatenate([np.asarray(part[2]) for part in found])
        runs = rho >= 0.5
        loss = sum(float(part[0] * part[1]) for part in found) / sum(float(part[1]) for part in found)
        print(kept.add(
            case=case, layers=round(float(runs.sum(1).mean()), 3), nats_a_token=round(loss, 4),
            layers_run=[round(float(x), 3) for x in runs.mean(0)], patterns=len({tuple(row) for row in runs.tolist()}),
        ))  # fmt: skip
        return runs

    layers = lm.config.num_layers
    whole = [jnp.ones((8, layers))] * len(batches)
    measure("base", lm.params, whole)
    chosen = measure("routers", routed)
    adapted = measure("routers, LoRA", both)
    models = [("base", lm.params, chosen), ("LoRA of FiRST", both, adapted)]
    measure("LoRA of FiRST, all layers", both, whole)
    if args.control:
        control = train_control(lm, args)
        measure("LoRA without routers, all layers", control, whole)
        measure("LoRA without routers, routers", {**control, "first": routed["first"]})
        models.append(("LoRA without routers", control, chosen))
    for name, params, runs in models:
        for rule, gates in skips(runs, args.seed).items():
            measure(
                f"{name}, {rule}", params, [jnp.asarray(part, jnp.float32) for part in np.split(gates, len(batches))]
            )
    for batch in (1, 8) if args.rounds else ():
        tokens = jnp.asarray(batches[0]["ids"][:batch, :PROMPT])
        lengths = jnp.full(batch, PROMPT)
        config = decode.Config(max_tokens=ANSWER, eos=())
        for case, step, params in (("base", lm.step, lm.params), ("FiRST", first, both)):
            generate = jax.jit(functools.partial(decode.generate, step, config=config))
            call = lambda: jax.block_until_ready(generate(params, tokens, lengths, key=jax.random.key(0)))  # noqa: B023, E731
            call()
            seconds = []
            for _ in range(args.rounds):
                begun = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begun)
            each = 1e3 * sorted(seconds)[len(seconds) // 2] / ANSWER
            print(kept.add(case=f"decoding, {case}", batch=batch, milliseconds_a_step=round(each, 4)))
    return kept.save()


def skips(runs, seed: int):
    """Decisions bool[B, L] with as many layers as `runs bool[B, L]`, by chance and by two fixed rules."""
    import numpy as np

    rows, layers = runs.shape
    rng = np.random.default_rng(seed)
    chance = np.stack([rng.permutation(row) for row in runs])
    skipped = round(float((~runs).sum(1).mean()))
    often, even = np.ones(layers, bool), np.ones(layers, bool)
    often[np.argsort(runs.mean(0), kind="stable")[:skipped]] = False
    even[np.round(np.linspace(0, layers - 1, skipped + 2)[1:-1]).astype(int)] = False
    fixed = {"skipped by chance": chance}
    fixed["the layers skipped most"] = np.broadcast_to(often, (rows, layers))
    fixed["layers evenly spread"] = np.broadcast_to(even, (rows, layers))
    return fixed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tinycode")
    parser.add_argument("--first", required=True, help="folder of routers and adapter")
    parser.add_argument("--control", type=Path, help="folder in which LoRA without routers is trained")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of decoding; 0: none")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="bench_first")
    print(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
