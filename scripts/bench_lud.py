"""Lexical Unit Decoding on a model trained for it: tokens a forward beside what the guesses cost in quality.

    jaxinfer train lud --output runs/lud --rank 6 --rate 2e-2 --steps 400 --batch-tokens 2048
    python scripts/bench_lud.py --adapter runs/lud/adapter

For several theta: tokens a forward; how much of the answer equals the same model's plain greedy answer (tokens before
the first difference, and all tokens in place); nats a token of the answer under the base model (plain answers beside
it); the share of answers without a syntax error (`ast`, up to the last whole line). Before these, bits per byte of
held-out text as a plain language model, before and after training. Counts and losses hold on a busy machine too; the
wall-clock a token, told as well, is to be believed on a quiet one. Takes about three minutes of one core.

Stability: experimental.
"""

import argparse
import ast
import functools
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

PROMPT, ANSWER = 96, 128
THETAS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)


def prompts(encode, count: int) -> list[tuple[str, list[int]]]:
    """(text, ids) that begin where a top-level function or class of a held-out module begins, of PROMPT tokens."""
    from jaxinfer.train.data import standard_library

    found = []
    for document in standard_library().held_out:
        for node in ast.parse(document.text).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            text = "".join(document.text.splitlines(keepends=True)[node.lineno - 1 :])
            ids = encode(text[:4000])
            if len(ids) > PROMPT + ANSWER:
                found.append((text, ids[:PROMPT]))
                break
    if len(found) < count:
        raise SystemExit(f"the held-out modules give {len(found)} prompts, {count} are needed")
    return found[:: len(found) // count][:count]


def parses(text: str) -> bool:
    """Whether the whole lines of `text` are the beginning of a Python module: no error but at their end."""
    lines = text.splitlines()[:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse("\n".join(lines) + "\n")
        except SyntaxError as error:
            # What only lacks its end is told at the last line or, of brackets and strings, as "never closed".
            return "never closed" in str(error) or "unterminated triple" in str(error) or _at_end(error, lines)
    return True


def _at_end(error: SyntaxError, lines: Sequence[str]) -> bool:
    return (error.lineno or 0) > len(lines) or ("expected an indented block" in str(error) and _last(error, lines))


def _last(error: SyntaxError, lines: Sequence[str]) -> bool:
    return not any(line.strip() for line in lines[error.lineno or 0 :])


def nats(step, params, rows: Sequence[Sequence[int]]) -> float:
    """Nats a token of the answers in `rows` (prompts of PROMPT tokens before them) under a model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinfer.train.lm import token_losses

    total, count = 0.0, 0
    losses = jax.jit(functools.partial(token_losses, step))
    for row in rows:
        ids = np.zeros((1, PROMPT + ANSWER + 1), np.int32)
        ids[0, : len(row)] = row
        zeros = np.zeros_like(ids[:, :-1])
        index = np.arange(ids.shape[1] - 1)[None]
        positions = np.where(index < len(row), index, -1)
        batch = {"ids": ids[:, :-1], "targets": ids[:, 1:], "segments": zeros, "positions": positions}
        found = losses(params, jax.tree.map(jnp.asarray, batch))
        total += float(found[0, PROMPT - 1 : len(row) - 1].sum())
        count += len(row) - PROMPT
    return total / max(count, 1)


def same(rows: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(share of tokens before the first difference, share of tokens equal in place) of answers beside plain ones."""
    before = equal = total = 0
    for got, want in zip(rows, plain, strict=True):
        hits = [a == b for a, b in zip(got, want, strict=False)]
        total += max(len(got), len(want))
        equal += sum(hits)
        before += hits.index(False) if False in hits else len(hits)
    return before / total, equal / total


def run(args: argparse.Namespace):
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxinfer
    from jaxinfer import decode, quant
    from jaxinfer.measure.results import Results
    from jaxinfer.models.adapters import load_adapter
    from jaxinfer.train import data
    from jaxinfer.train.lm import bits_per_byte

    lm = jaxinfer.load(args.target, dtype="float32")
    trained = quant.merge(load_adapter(lm.step.config, lm.params, args.adapter))
    given = prompts(lm.tokenizer.encode, args.prompts)
    tokens, lengths = jnp.asarray([ids for _, ids in given]), jnp.full(len(given), PROMPT)
    kept = Results(args.name, args.results, settings={"prompt": PROMPT, "answer": ANSWER, "k": args.k})
    held_out = data.standard_library().held_out
    held_out = held_out[:: max(1, len(held_out) // args.documents)]
    encoded, size = data.encode(lm.tokenizer.backend, held_out), sum(document.num_bytes for document in held_out)
    for name, params in (("base", lm.params), ("lud", trained)):
        bits = bits_per_byte(lm.step, params, encoded, num_bytes=size, window=512, stride=256)
        print(kept.add(case="plain language model", model=name, bits_per_byte=round(bits, 4)))

    def answers(params, theta):
        drafter = decode.Autoregressive() if theta is None else decode.LUD(args.k, theta, lm.tokenizer.pad_id)
        config = decode.Config(max_tokens=ANSWER, drafter=drafter)
        generate = jax.jit(functools.partial(decode.generate, lm.step, config=config))
        call = lambda: jax.block_until_ready(generate(params, tokens, lengths, key=jax.random.key(0)))  # noqa: E731
        result = call()
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        pairs = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
        rows = [row[:n].tolist() for row, n in pairs]
        return rows, float(result.stats.tokens_per_forward), seconds / sum(map(len, rows))

    plain = {}
    rows_to_make = [("base, plain", lm.params, None), ("lud, plain", trained, None)]
    rows_to_make += [(f"lud, theta {theta}", trained, theta) for theta in args.thetas]
    rows_to_make += [("base, theta 0.9", lm.params, 0.9)]
    for name, params, theta in rows_to_make:
        rows, rate, seconds = answers(params, theta)
        plain.setdefault(id(params), rows)
        before, equal = same(rows, plain[id(params)])
        whole = [[*ids, *row] for (_, ids), row in zip(given, rows, strict=True)]
        fine = [parses(lm.tokenizer.decode(row)) for row in whole]
        print(kept.add(
            case=name, theta=theta, tokens_per_forward=round(rate, 3), same_prefix=round(before, 3),
            same_tokens=round(equal, 3), nats_under_base=round(nats(lm.step, lm.params, whole), 4),
            parses=round(sum(fine) / len(fine), 3), milliseconds_a_token=round(1e3 * seconds, 3),
        ))  # fmt: skip
    return kept.save()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tinycode")
    parser.add_argument("--adapter", required=True, help="folder of the trained adapter")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--thetas", type=float, nargs="+", default=THETAS)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--documents", type=int, default=16, help="held-out documents for bits per byte")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="bench_lud")
    print(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
