"""The proof that answers under a JSON Schema are what the schema says, on other people's schemas.

    python scripts/check_grammar.py                # about two minutes on 2 cores
    python scripts/check_grammar.py --sample 0     # acceptance alone, seconds

Reads two public collections from ../shared/data/jsonschema (or --data) and says that it skipped where they are absent:
500 real schemas of MaskBench with instances, and the JSON Schema Test Suite, draft 2020-12.

- MaskBench: every valid instance is accepted token by token and every other refused; schemas that are refused are
  listed with the keyword that llguidance cannot hold.
- Answers: `tinycode` writes at temperature 1 under the schemas, drafts by CopySpec in every second batch, until it ends
  the document or the tokens are spent. Every document that ended is valid to the `jsonschema` library; of those cut
  short, what stands is a beginning that the grammar allows.
- The Test Suite: each group is held exactly, narrower (no invalid instance accepted), or refused with a message. A
  group that is wider must be one of those known here.
- What a mask costs the host, beside a step of the model.

Writes scripts/results/check_grammar-<device>.json and exits with 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jsonschema.validators import Draft202012Validator, validator_for

import jaxinfer
from jaxinfer.decode import Autoregressive, Config, CopySpec, Reason, Sampling, loop
from jaxinfer.decode.constrained import Constrained
from jaxinfer.decode.grammar import Grammar, Matcher
from jaxinfer.decode.language_model import LanguageModel
from jaxinfer.errors import InputError
from jaxinfer.measure import Results

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "jsonschema"
# Groups in which the library accepts an instance that the suite calls invalid: `format` is an annotation in this draft,
# and llguidance holds more of it than nothing; Rust's and ECMAScript's classes of white space differ in U+FEFF.
KNOWN_WIDER = {
    ("optional/ecmascript-regex.json", "ECMA 262 \\S matches everything but whitespace"),
    ("optional/format/date-time.json", "validation of date-time strings"),
    ("optional/format/date.json", "validation of date strings"),
    ("optional/format/hostname.json", "validation of host names"),
    ("optional/format/hostname.json", "validation of A-label (punycode) host names"),
    ("optional/format/time.json", "validation of time strings"),
}
ROWS, PROMPT = 32, "import json\n\nvalue = "


def matcher_of(lm: LanguageModel, schema: Any) -> Matcher | str:
    """The schema's matcher, or why it is refused."""
    try:
        return lm.codec.vocabulary.matcher(Grammar.json_schema(schema))
    except InputError as error:
        return str(error)


def reason_of(message: str) -> str:
    """What a refusal names: the library's words after the schema's text."""
    text = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
    found = re.search(rf"got ({text})(\.\.\.)?: (.*?)( while processing.*)?; accepted", message)
    return found.group(3)[:100] if found else message


def spelled(lm: LanguageModel, instance: Any) -> list[int]:
    """The tokens of an instance's JSON text."""
    return lm.tokenizer.encode(json.dumps(instance, ensure_ascii=False), add_special_tokens=False)


def check_instances(lm: LanguageModel, cases: Sequence[dict[str, Any]], bad: list[str]) -> dict[str, Any]:
    """MaskBench's instances through the masks."""
    counts: collections.Counter[str] = collections.Counter()
    refused: dict[str, list[str]] = collections.defaultdict(list)
    compile_ms = []
    for case in cases:
        begun = time.perf_counter()
        matcher = matcher_of(lm, case["schema"])
        compile_ms.append((time.perf_counter() - begun) * 1e3)
        if isinstance(matcher, str):
            refused[reason_of(matcher)].append(case["name"])
            continue
        for test in case["tests"]:
            got = matcher.accepts(spelled(lm, test["data"]))
            counts[f"{'valid' if test['valid'] else 'invalid'}_{'accepted' if got else 'refused'}"] += 1
            if got != test["valid"]:
                bad.append(f"{case['name']}: an instance that is {'' if test['valid'] else 'not '}valid was misjudged")
    listed = {reason: names for reason, names in sorted(refused.items(), key=lambda item: -len(item[1]))}
    total = sum(map(len, refused.values()))
    return {
        "schemas": len(cases), "held": len(cases) - total, "refused": total, **counts,
        "compile_ms_median": float(np.median(compile_ms)), "compile_ms_max": max(compile_ms), "refused_by": listed,
    }  # fmt: skip


def check_suite(lm: LanguageModel, folder: Path, bad: list[str]) -> dict[str, Any]:
    """Every group of the Test Suite: held exactly, narrower, wider, or refused."""
    outcomes: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    narrower: collections.Counter[str] = collections.Counter()
    for file in sorted(folder.rglob("*.json")):
        name = file.relative_to(folder).as_posix()
        for group in json.loads(file.read_text(encoding="utf-8")):
            matcher = matcher_of(lm, group["schema"])
            if isinstance(matcher, str):
                outcomes["refused"] += 1
                reasons[reason_of(matcher)] += 1
                continue
            pairs = [(test["valid"], matcher.accepts(spelled(lm, test["data"]))) for test in group["tests"]]
            if any(got and not valid for valid, got in pairs):
                outcomes["wider"] += 1
                if (name, group["description"]) not in KNOWN_WIDER:
                    bad.append(f"{name}, {group['description']!r}: an instance that is not valid was accepted")
            elif any(valid and not got for valid, got in pairs):
                outcomes["narrower"] += 1
                narrower[name] += 1
            else:
                outcomes["exact"] += 1
    return {
        "groups": sum(outcomes.values()), **outcomes, "narrower_by_file": dict(narrower.most_common()),
        "refused_by": dict(reasons.most_common()),
    }  # fmt: skip


def batches(lm: LanguageModel, cases: Sequence[dict[str, Any]]) -> Iterator[list[tuple[dict[str, Any], Matcher]]]:
    """ROWS schemas at a time with their matchers; refused ones are left out."""
    held = [(case, matcher) for case in cases if not isinstance(matcher := matcher_of(lm, case["schema"]), str)]
    for first in range(0, len(held), ROWS):
        yield held[first : first + ROWS]


def check_answers(
    lm: LanguageModel, cases: Sequence[dict[str, Any]], max_tokens: int, bad: list[str]
) -> dict[str, Any]:
    """Documents that the model writes under the schemas, judged by another library."""
    counts: collections.Counter[str] = collections.Counter()
    forwards = tokens = 0
    for number, batch in enumerate(batches(lm, cases)):
        drafter = CopySpec(2, 4) if number % 2 else Autoregressive()
        config = Config(max_tokens=max_tokens, temperature=1.0, drafter=drafter)
        state = begin(lm, config, ROWS, rows=len(batch), seed=number)
        matchers: list[Matcher | None] = [matcher.fork() for _, matcher in batch]
        driver = Constrained(lm.step, lm.params, matchers + [None] * (ROWS - len(batch)), config=config)
        result = jax.device_get(loop.result(driver.advance(state, 10**6), config))
        forwards, tokens = forwards + int(result.stats.forwards.sum()), tokens + int(result.lengths.sum())
        for row, (case, matcher) in enumerate(batch):
            ids, reason = result.tokens[row, : result.lengths[row]].tolist(), Reason(int(result.finish_reason[row]))
            verdict = judged(lm, case, matcher, ids, reason)
            counts[verdict] += 1
            if verdict not in ("valid", "cut short"):
                bad.append(f"{case['name']}: {verdict}: {lm.tokenizer.decode(ids)[:200]!r}")
        print(f"check_grammar: {sum(counts.values())} answers, {dict(counts)}", file=sys.stderr, flush=True)
    return {"answers": sum(counts.values()), **counts, "tokens_per_forward": tokens / max(forwards, 1)}


def judged(lm: LanguageModel, case: dict[str, Any], matcher: Matcher, ids: list[int], reason: Reason) -> str:
    """What one answer is: valid, cut short, or what is wrong with it."""
    if reason == Reason.LENGTH:
        return "cut short" if matcher.begins(ids) else "left its grammar"
    if reason != Reason.EOS:
        return f"ended with {reason.name}"
    schema = case["schema"]
    validator = validator_for(schema, Draft202012Validator)(schema)
    try:
        return "valid" if validator.is_valid(json.loads(lm.tokenizer.decode(ids[:-1]))) else "not valid"
    except ValueError:
        return "no JSON"


def begin(lm: LanguageModel, config: Config, size: int, *, rows: int, seed: int) -> loop.State:
    """The state of `size` rows of one prompt, of which the last ones are done before they begin."""
    tokens, lengths = lm.encode([PROMPT] * size)
    limits = np.where(np.arange(size) < rows, config.max_tokens, 0)
    sampling = Sampling.make(size, temperature=config.temperature, eos=lm.step.eos, max_tokens=limits)
    return _begin(
        lm.step, lm.params, tokens, lengths, config=config, key=jax.random.key(seed), sampling=sampling,
        row_ids=jnp.arange(size),
    )  # fmt: skip


_begin = jax.jit(loop.begin, static_argnames=("step", "config"))


def cost(lm: LanguageModel, cases: Sequence[dict[str, Any]], rounds: int = 9) -> dict[str, Any]:
    """Milliseconds of a step with masks and without, of a step of the whole compiled loop, and of a mask: medians."""
    out: dict[str, Any] = {}
    advance = jax.jit(loop.advance, static_argnames=("step", "config"), donate_argnames=("state",))
    (batch, *_) = batches(lm, cases)
    for size in (1, 8):
        config = Config(max_tokens=128, temperature=1.0)
        seen: dict[str, list[float]] = collections.defaultdict(list)
        for turn in range(rounds + 1):
            for kind in ("masks", "no masks", "compiled loop"):
                state = jax.block_until_ready(begin(lm, config, size, rows=size, seed=turn))
                begun = time.perf_counter()
                if kind == "compiled loop":
                    jax.block_until_ready(advance(lm.step, lm.params, state, config=config, steps=64))
                    steps = 64.0
                else:
                    own = [batch[(turn * size + i) % len(batch)][1].fork() for i in range(size)]
                    driver = Constrained(
                        lm.step, lm.params, own if kind == "masks" else [None] * size, config=config, jump=False
                    )
                    driver.advance(state, 64)
                    steps = float(driver.spent.steps)
                    if kind == "masks" and turn:
                        seen["mask_us"].append(1e6 * driver.spent.mask_seconds / max(driver.spent.masks, 1))
                if turn:  # the first compiles
                    seen[kind].append(1e3 * (time.perf_counter() - begun) / max(steps, 1))
        out |= {f"batch {size}: {name}": float(np.median(values)) for name, values in seen.items()}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of both collections")
    parser.add_argument("--sample", type=int, default=500, help="schemas under which answers are written; 0: none")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    schemas, suite = options.data / "maskbench_500.jsonl", options.data / "tests" / "draft2020-12"
    if not schemas.is_file() or not suite.is_dir():
        print(f"check_grammar: skipped: {options.data} has no MaskBench schemas and JSON Schema Test Suite")
        return 0
    lm = jaxinfer.load("tinycode")
    cases = [json.loads(line) for line in schemas.read_text(encoding="utf-8").splitlines()]
    bad: list[str] = []
    results = Results("check_grammar", settings={**vars(options), "data": "jsonschema"})
    rows = {"maskbench": check_instances(lm, cases, bad), "suite": check_suite(lm, suite, bad)}
    if options.sample:
        random.Random(options.seed).shuffle(cases)
        rows["answers"] = check_answers(lm, cases[: options.sample], options.max_tokens, bad)
        rows["milliseconds"] = cost(lm, cases)
    for name, row in rows.items():
        print(json.dumps(results.add(part=name, **row), indent=1))
    print(f"check_grammar: written: {results.save()}", file=sys.stderr)
    for line in bad[:20]:
        print(f"check_grammar: FAILED: {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
