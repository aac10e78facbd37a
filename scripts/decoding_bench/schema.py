"""The fourth task: a record of a function as JSON under a schema, decoded step by step with the host's masks.

The prompt is one function with its record as an example, and another function; the answer is its record. The schema is
bounded, so that every answer ends. Plain decoding here is the same path without drafts (it jumps over what the schema
forces); `beside_unconstrained` holds its speed against the unconstrained decoding of the same prompts.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jaxinfer
from decoding_bench.ours import Setting, Subject
from jaxinfer.batch.params import SamplingParams
from jaxinfer.batch.requests import Prepared, Request, prepare
from jaxinfer.decode import Autoregressive
from jaxinfer.decode.run import Answer, Completion, Run
from jaxinfer.train.data import Document, standard_library

WORD = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z_0-9]{0,15}$"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": WORD,
        "arguments": {"type": "array", "items": WORD, "maxItems": 4},
        "statements": {"type": "integer", "minimum": 0, "maximum": 99},
        "documented": {"type": "boolean"},
        "kind": {"enum": ["function", "generator", "coroutine"]},
    },
    "required": ["name", "arguments", "statements", "documented", "kind"],
    "additionalProperties": False,
    # The library's own option: separators as json.dumps writes them, and so in the example. Else a model in doubt
    # fills its answer with white space.
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}
SHORTEST, LONGEST, TOKENS, LOOK = 129, 224, 160, 64
UNCONSTRAINED = "plain, no schema"


def prompts(count: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of `count` prompts, one a held-out module, all of one width's bucket."""
    codec = jaxinfer.load("tinycode", dtype="float32").codec
    found = []
    for document in standard_library().held_out:
        functions = list(_functions(document))
        for (first, one), (second, _) in zip(functions, functions[1:], strict=False):
            ids = codec.encode(f"{first}\n\n# {json.dumps(one)}\n\n\n{second}\n\n# ")
            if SHORTEST <= len(ids) <= LONGEST:
                found.append(tuple(ids))
                break
        if len(found) == count:
            return tuple(found)
    raise SystemExit(f"json: the held-out modules give {len(found)} prompts, {count} are needed")


def _functions(document: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    """Top-level functions: their source and their record."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(node))
            record = {
                "name": node.name, "arguments": [a.arg for a in node.args.args], "statements": len(node.body),
                "documented": ast.get_docstring(node) is not None, "kind": "generator" if yields else "function",
            }  # fmt: skip
            yield ast.get_source_segment(document.text, node) or "", record


class Runner:
    """Decodes the prompts with `method` under the schema (`None`: plain, without one) when it is called.

    `answers`: the Completions of the last call; `spent`: what its masks cost the host.
    """

    def __init__(self, subject: Subject, method: str | None, setting: Setting):
        self.subject, self.method, self.setting = subject, method, setting
        self.codec = jaxinfer.load("tinycode", dtype="float32").codec
        self.answers: list[Completion] = []
        self.spent: dict[str, float] = {}
        own = {"ignore_eos": True} if method is None else {"json_schema": SCHEMA}
        params = SamplingParams().from_json({"max_tokens": setting.tokens, "temperature": setting.temperature} | own)
        limits = jaxinfer.load("tinycode", dtype="float32").limits
        self.rows = [_row(i, ids, params, self.codec, limits) for i, ids in enumerate(setting.prompts)]

    def __call__(self) -> None:
        drafter, draft_params = (Autoregressive(), None)
        if self.method is not None:
            drafter, draft_params = self.subject.method(self.method, self.setting)
        self.answers, self.spent = [], {"masks": 0.0, "mask_seconds": 0.0, "steps": 0.0, "seconds": 0.0}
        for first in range(0, len(self.rows), self.setting.batch):
            rows = self.rows[first : first + self.setting.batch]
            run = Run(
                self.subject.step, self.subject.params, rows, range(first, first + len(rows)), seed=0, drafter=drafter,
                draft_params=draft_params,
            )  # fmt: skip
            answers = [Answer(row, self.codec) for row in rows]
            while not run.done:
                run.advance(LOOK)
                run.read(answers)
            self.answers += run.completions(answers)
            for name in self.spent if run.spent is not None else ():
                self.spent[name] += getattr(run.spent, name)


def _row(i: int, ids: Sequence[int], params: SamplingParams, codec: Any, limits: Any) -> Prepared:
    row = prepare(Request(i, tuple(ids), None, params), codec, limits)
    if not isinstance(row, Prepared):
        raise SystemExit(f"json: prompt {i}: {row.error}")
    return row


def statistics(runner: Runner, plain: Runner) -> dict[str, Any]:
    """Tokens a forward, answers that the schema's own validator takes, and the masks' time beside the steps'."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(SCHEMA)

    def holds(completion: Completion) -> bool:
        try:
            return validator.is_valid(json.loads(completion.text))
        except ValueError:
            return False

    answers, spent = runner.answers, runner.spent
    emitted, forwards = (sum(getattr(c.stats, part) for c in answers) for part in ("emitted", "forwards"))
    accepted = sum(c.stats.accepted for c in answers)
    found = {
        "tokens": emitted,
        "tokens_per_forward": emitted / max(forwards, 1),
        "forwards_per_100": 100 * forwards / max(emitted, 1),
        "accepted_per_forward": accepted / max(forwards, 1),
        "equal": sum(a.tokens == b.tokens for a, b in zip(answers, plain.answers, strict=True)),
    }
    if runner.method is None:
        return found
    return found | {
        "answers": len(answers),
        "finished": sum(c.finish_reason == "stop" for c in answers),
        "valid": sum(map(holds, answers)),
        "mask_us_per_token": 1e6 * spent["mask_seconds"] / max(emitted, 1),
        "mask_share": spent["mask_seconds"] / max(spent["seconds"], 1e-9),
        "step_us": 1e6 * spent["seconds"] / max(spent["steps"], 1),
    }
