"""One prompt answered on stdout.

Stability: internal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from jaxinfer.batch.params import SamplingParams
from jaxinfer.checkpoint import hub
from jaxinfer.cli import codes, compiled, options
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import Completion, LanguageModel


def prepare(
    model: str, draft_model: str | None, chosen: options.Format, max_length: int | None, mesh: str | None = None
) -> LanguageModel:
    """The model loaded, over the devices of `mesh`, with compiled programs kept and announced."""
    compiled.use_cache()
    compiled.announce()
    devices = None if mesh is None else options.mesh_of(mesh, options.step_of(hub.resolve(model), chosen, max_length))
    return options.load(model, chosen, max_length=max_length, draft_model=draft_model, mesh=devices)


def room(lm: LanguageModel, prompts: Sequence[str], max_tokens: int) -> int:
    """Tokens of the buckets that hold each of `prompts` and its answer."""
    from jaxinfer.decode.run import ANSWER_BUCKET, PROMPT_BUCKET, bucket

    longest = max(len(lm.codec.encode(prompt)) for prompt in prompts)
    return min(bucket(longest, PROMPT_BUCKET) + bucket(max_tokens, ANSWER_BUCKET), lm.config.max_length)


def answer(lm: LanguageModel, prompt: str, sampling: SamplingParams, *, seed: int, drafter: Any, as_json: bool) -> None:
    """The answer as text (as it comes, on a terminal) or as one JSON line; several answers one after another."""
    given = {**sampling.changed(), "seed": seed, "drafter": drafter}
    if sys.stdout.isatty() and sampling.n == 1 and not as_json:
        ends: list[Completion] = []
        for piece in lm.stream(prompt, on_finish=ends.append, **given):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        _check(ends)
        return
    found = lm.generate(prompt, **given)
    found = found if isinstance(found, list) else [found]
    if as_json:
        sys.stdout.write(_line(lm, prompt, sampling, found))
    else:
        sys.stdout.write("\n----\n".join(completion.text for completion in found) + "\n")
    _check(found)


def _line(lm: LanguageModel, prompt: str, sampling: SamplingParams, found: list[Completion]) -> str:
    """The line that a batch job would write, with `stats` of what it cost."""
    import dataclasses
    import json

    from jaxinfer.batch.answers import answer_line
    from jaxinfer.batch.requests import Prepared, Request, prepare

    row = prepare(Request("prompt", prompt, None, dataclasses.replace(sampling, echo=False)), lm.codec, lm.limits)
    if not isinstance(row, Prepared):
        raise InputError(row.error)
    line = json.loads(answer_line(row, [completion.sample for completion in found], lm.codec))
    line["stats"] = [dataclasses.asdict(c.stats) | {"tokens_per_forward": c.stats.tokens_per_forward} for c in found]
    return json.dumps(line, ensure_ascii=False) + "\n"


def _check(found: list[Completion]) -> None:
    if any(completion.finish_reason == "error" for completion in found):
        typer.echo("jaxinfer: the model's logits are not finite: its weights or their format are broken", err=True)
        raise typer.Exit(codes.INTERNAL)
