"""HAMburger around a trained model: tokens a macro step, cache entries a token, and what merging costs in quality.

    jaxinfer train hamburger --target tinycode --output runs/hamburger     # 200 updates: about 15 minutes of one core
    python scripts/bench_hamburger.py --model runs/hamburger

Held-out text first: bits per byte in windows of 256 tokens of which none is read twice, of the target, and of the
trained model at several confidences, which cuts each text into groups itself (probabilities of all texts sum to one, so
the figures compare with the target's). Then greedy answers to prompts from held-out modules: tokens a macro step, cache
entries a token, how much equals the same model's answer without merging and the target's plain answer, nats a token
under the target, and the share of answers without a syntax error. Counts and losses hold on a busy machine too; the
wall-clock a token, told as well, is to be believed on a quiet one. Takes about three minutes of one core.

Stability: experimental.
"""

import argparse
import functools
import math
import time
from pathlib import Path

from bench_lud import ANSWER, PROMPT, nats, parses, prompts, same

CONFIDENCES = (1.0, 0.95, 0.9, 0.8, 0.6)  # 1: nothing is merged; it comes first
WINDOW = 256


def windows(documents, count: int, end: int):
    """`count` windows i32[count, WINDOW] of `end` and the tokens after it, spread over the held-out documents."""
    import numpy as np

    pieces = [d[i : i + WINDOW - 1] for d in documents for i in range(0, len(d) - WINDOW, WINDOW - 1)]
    chosen = pieces[:: max(1, len(pieces) // count)][:count]
    return np.concatenate([np.full((len(chosen), 1), end), np.stack(chosen)], 1).astype(np.int32)


def run(args: argparse.Namespace):
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxinfer
    from jaxinfer import decode
    from jaxinfer.decode import hamburger
    from jaxinfer.decode.hamburger import Smashing
    from jaxinfer.measure.results import Results
    from jaxinfer.models.hamburger import load_parts
    from jaxinfer.train import text

    target = jaxinfer.load(args.target, dtype="float32")
    trained = jaxinfer.load(args.model, dtype="float32")
    model, params = load_parts(args.model, trained.step, trained.params)
    kept = Results(args.name, args.results, settings={"prompt": PROMPT, "answer": ANSWER, "size": model.size})
    corpus = text.load(None, target.tokenizer, vocab_size=target.step.vocab_size)
    scored = windows(corpus.held_out, args.windows, corpus.end)
    size = sum(len(target.tokenizer.decode(row[1:].tolist()).encode()) for row in scored)
    told = jnp.full(len(scored), WINDOW)

    def held_out(name, params, confidence):
        score = jax.jit(functools.partial(hamburger.score, model, smashing=Smashing(confidence)))
        losses, steps = score(params, jnp.asarray(scored), told)
        tokens, total = len(scored) * (WINDOW - 1), float(losses.sum())
        print(kept.add(
            case="held-out text", model=name, confidence=confidence,
            bits_per_byte=round(total / math.log(2) / size, 4), nats_a_token=round(total / tokens, 4),
            tokens_a_step=round(tokens / int(steps.sum()), 3),
        ), flush=True)  # fmt: skip

    held_out("target", {**params, "base": target.params}, 1.0)
    for confidence in args.confidences:
        held_out("trained", params, confidence)

    given = prompts(target.tokenizer.encode, args.prompts)
    tokens, lengths = jnp.asarray([ids for _, ids in given]), jnp.full(len(given), PROMPT)
    config = decode.Config(max_tokens=ANSWER)

    def answers(generate, params):
        call = lambda: jax.block_until_ready(generate(params, tokens, lengths, key=jax.random.key(0)))  # noqa: E731
        result = call()
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        pairs = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
        return [row[:n].tolist() for row, n in pairs], result.stats, seconds

    def tell(name, confidence, rows, stats, seconds, references):
        count, steps = sum(map(len, rows)), int(stats.forwards.sum())
        whole = [[*ids, *row] for (_, ids), row in zip(given, rows, strict=True)]
        fine = [parses(target.tokenizer.decode(row)) for row in whole]
        shares = {f"same_as_{k}": [round(x, 3) for x in same(rows, other)] for k, other in references.items()}
        print(kept.add(
            case="answers", model=name, confidence=confidence, tokens_a_step=round(count / steps, 3),
            entries_a_token=round(steps / count, 3), **shares,
            nats_under_target=round(nats(target.step, target.params, whole), 4),
            parses=round(sum(fine) / len(fine), 3), milliseconds_a_token=round(1e3 * seconds / count, 3),
        ), flush=True)  # fmt: skip

    plain = jax.jit(functools.partial(decode.generate, target.step, config=config))
    first, stats, seconds = answers(plain, target.params)
    tell("target", None, first, stats, seconds, {})
    references = {"target": first}
    for confidence in args.confidences:
        smashing = Smashing(confidence)
        generate = jax.jit(functools.partial(hamburger.generate, model, config=config, smashing=smashing))
        rows, stats, seconds = answers(generate, params)
        references.setdefault("unmerged", rows)
        tell("trained", confidence, rows, stats, seconds, references)
    return kept.save()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tinycode")
    parser.add_argument("--model", default="runs/hamburger", help="folder that `jaxinfer train hamburger` wrote")
    parser.add_argument("--confidences", type=float, nargs="+", default=CONFIDENCES, help="1 first")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--windows", type=int, default=48, help="held-out windows that are scored")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="bench_hamburger")
    print(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
