"""The work of `jaxinfer compare`: what a method's name means, and the runs in turns.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.cli import one, options
from jaxinfer.cli.specs import Registry
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import Completion, LanguageModel

# A drafter by its own name; a format with the word for what it is the format of, since int8 is one of both.
METHODS = Registry(
    "--methods",
    {
        **options.DRAFTERS.entries,
        **{f"{name}-weights": entry for name, entry in options.WEIGHTS.entries.items()},
        **{f"{name}-cache": entry for name, entry in options.CACHES.entries.items() if name != "auto"},
    },
)
PROMPTS = (
    "def read_json(path):\n    ",
    "import os\nimport sys\n\n\ndef main(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "    for i in range(len(",
)


@dataclasses.dataclass(frozen=True)
class Method:
    """`name` as it was written, and how it makes its model and drafter out of the loaded model, for so many rows of so
    many tokens."""

    name: str
    build: Callable[[LanguageModel, int, int], tuple[LanguageModel, Any]]


def split(methods: str) -> list[str]:
    """Names at their commas, where `key=value` goes on with the method before: "draft:gamma=2,plain"."""
    names: list[str] = []
    for part in methods.split(","):
        if names and "=" in part.partition(":")[0]:
            names[-1] += f",{part}"
        else:
            names.append(part)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--methods: got {twice[0]!r} twice; accepted: each method once")
    return names


def parse(name: str) -> Method:
    """One method. InputError lists what is accepted, before any weight is loaded."""
    word = name.partition(":")[0]
    if word in options.DRAFTERS.entries:
        METHODS.parse(name, step=None, target=None)
        return Method(name, lambda lm, batch, room: (lm, options.drafter_of(name, lm, batch=batch, capacity=room)))
    spec = METHODS.parse(name)
    plain = options.DRAFTERS.parse("plain")
    if word.endswith("-weights"):
        return Method(name, lambda lm, *_: (dataclasses.replace(lm, params=_quantized(lm.params, spec)), plain))
    return Method(name, lambda lm, *_: (dataclasses.replace(lm, step=dataclasses.replace(lm.step, cache=spec)), plain))


def _quantized(params: Any, spec: Any) -> Any:
    from jaxinfer import quant

    return quant.apply(params, options.rules_of(spec))


def prompts_of(prompt: Sequence[str] | None, files: Sequence[Path] | None) -> list[str]:
    """The texts to continue: those given, those of the files' rows, or a few lines of Python."""
    if prompt and files:
        raise InputError("compare: got --prompt beside --input; accepted: one of the two")
    if not files:
        return list(prompt or PROMPTS)
    from jaxinfer.batch.files import check_inputs, read
    from jaxinfer.batch.params import SamplingParams
    from jaxinfer.batch.requests import BadRow, parse_row

    check_inputs(files)
    found = []
    for path in files:
        for record in read(path):
            where = f"{path}:{record.number}"
            row = parse_row(record.data, where=where, defaults=SamplingParams(), problem=record.problem)
            if isinstance(row, BadRow) or not isinstance(row.prompt, str):
                raise InputError(
                    f"{where}: {row.error if isinstance(row, BadRow) else 'accepted: a row with a prompt'}"
                )
            found.append(row.prompt)
    if not found:
        raise InputError(f"--input: got no rows in {', '.join(map(str, files))}; accepted: at least one")
    return found


def measure_all(
    lm: LanguageModel, methods: Sequence[Method], prompts: Sequence[str], *, rounds: int, batch_size: int, **asked: Any
) -> dict[str, Any]:
    """Every method on all prompts, in turns, as JSON values."""
    from jaxinfer import measure

    room = one.room(lm, prompts, asked["max_tokens"])
    built = {method.name: method.build(lm, batch_size, room) for method in methods}
    runs: dict[str, Callable[[], list[Completion]]] = {}
    answers: dict[str, list[Completion]] = {}
    for name, (model, drafter) in built.items():

        def run(name: str = name, model: LanguageModel = model, drafter: Any = drafter) -> list[Completion]:
            answers[name] = model.generate(prompts, drafter=drafter, batch_size=batch_size, **asked)
            return answers[name]

        runs[name] = run
    quiet = measure.quiet()
    timings = measure.interleaved(runs, rounds=rounds, warmup=1)
    first = methods[0].name
    rows = []
    for name, timing in timings.items():
        found = answers[name]
        tokens = sum(len(c.tokens) for c in found)
        forwards, emitted = (sum(getattr(c.stats, part) for c in found) for part in ("forwards", "emitted"))
        ratio = measure.speedup(timings[first], timing)
        rows.append(
            {
                "method": name,
                "tokens_per_second": tokens / timing.median,
                "speedup": ratio.median,
                "speedup_quartiles": [ratio.low, ratio.high],
                "tokens_per_forward": emitted / max(forwards, 1),
                "equal_answers": sum(a.tokens == b.tokens for a, b in zip(found, answers[first], strict=True)),
                "tokens": tokens,
                "seconds": timing.row(),
            }
        )
    settings = {"model": str(lm.directory), "prompts": len(prompts), "batch_size": batch_size, **asked}
    return {"settings": settings, "machine": measure.machine(), "quiet": quiet, "methods": rows}


def show(report: dict[str, Any]) -> None:
    """The table for people, with a word where a method is slower."""
    from jaxinfer.cli.output import print_table

    settings, rows = report["settings"], report["methods"]
    title = (
        f"{Path(settings['model']).name}: {settings['prompts']} prompts, {settings['max_tokens']} tokens each, "
        f"batch size {settings['batch_size']}, on {report['machine']['device_kind']}"
    )
    cells = []
    for row in rows:
        low, high = row["speedup_quartiles"]
        cells.append(
            (
                row["method"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})",
                f"{row['tokens_per_forward']:.2f}",
                f"{row['equal_answers']} of {settings['prompts']}",
            )
        )
    print_table(
        ("method", "tokens/s", f"speed beside {rows[0]['method']}", "tokens/forward", "equal answers"),
        cells,
        title=title,
    )
    slower = [row["method"] for row in rows[1:] if row["speedup"] < 1]
    if slower:
        print(f"Slower than {rows[0]['method']} here: {', '.join(slower)}.")
    if not report["quiet"]:
        print("Other programs were at work on this machine: the ratios are medians of turns, the speeds are too low.")
