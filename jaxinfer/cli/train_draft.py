"""`jaxinfer train draft`: a draft model for any target, in FastDraft's three stages.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import training
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.train.draft import Model

Stages = Annotated[
    str, typer.Option("--stages", help="Updates of each stage, in order; a stage that is left out is not run.")
]
General = Annotated[
    Path | None, typer.Option("--text", help="General text for the first stage; like --data. Default: from --data.")
]
Draft = Annotated[str | None, typer.Option("--draft", help="Begin from this model, in place of random weights.")]
Layers = Annotated[
    int | None, typer.Option("--layers", min=1, help="Of the draft. Default: a quarter of the target's.")
]
Width = Annotated[int | None, typer.Option("--width", min=8, help="Channels of the draft. Default: three quarters.")]
Loss = Annotated[str, typer.Option("--loss", help="Of the alignment: ce, ce+kl, ce+tv, kl or tv against the target.")]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=1, help="Tokens of the target's law that kl and tv tell apart. Default: all."),
]
Temperatures = Annotated[str, typer.Option("--temperatures", help="At which the target writes, in turn; 0 is greedy.")]


def draft(
    output: training.Output,
    target: training.Target = "tinycode",
    data: training.Data = None,
    text: General = None,
    draft: Draft = None,
    layers: Layers = None,
    width: Width = None,
    stages: Stages = "text=300,code=400,align=200",
    batch_tokens: training.BatchTokens = 4096,
    length: training.Length = 256,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate of text and code.")] = 5e-3,
    align_rate: Annotated[float, typer.Option("--align-rate", min=0, help="Peak learning rate of align.")] = 2e-3,
    copies: Annotated[float, typer.Option(min=0, max=1, help="Share of code windows that repeat a stretch.")] = 0.0,
    loss: Loss = "ce",
    top_k: TopK = None,
    prompt_weight: Annotated[float, typer.Option(min=0, max=1, help="Of a prompt's own tokens in align.")] = 0.0,
    temperatures: Temperatures = "0,0.6,0.8,1",
    answers: Annotated[int, typer.Option(min=1, help="That the target writes for align.")] = 512,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 96,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 160,
    gamma: Annotated[int, typer.Option(min=1, help="Drafts a forward, for the reports.")] = 3,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train a draft model: on text, on code, then on what the target writes (FastDraft). OUTPUT is a model directory.

    After each stage: how many drafts the target accepts on held-out text, tokens a target forward, and the speed-up
    that memory traffic allows; the figures are in OUTPUT/report.json too.

    \b
    Example:
      jaxinfer train draft --target DIR --data code.jsonl --text prose.jsonl --layers 2 --width 512 --output draft
    """
    from jaxinfer.cli.output import note, print_json
    from jaxinfer.train import draft as recipe
    from jaxinfer.train.draft_answers import Asking
    from jaxinfer.train.draft_report import Measuring

    settings = recipe.Settings(
        stages=stages_of(stages), batch_tokens=batch_tokens, length=length, copies=copies, rate=rate,
        align_rate=align_rate, loss=loss, top_k=top_k, prompt_weight=prompt_weight, seed=seed,
        asking=Asking(answers, prompt_tokens, answer_tokens, temperatures_of(temperatures)),
    )  # fmt: skip
    training.check_writable(output)
    lm = training.load_target(target)
    begun = _begin(lm, draft, layers, width, seed)
    code = training.load_text(data, lm)
    general = None if text is None else training.load_text(text, lm)
    params, reports = recipe.train_draft(
        recipe.Model(lm.step, lm.params), begun, code, settings, output / "stages", general=general, resume=resume,
        measuring=Measuring(gamma=gamma), loop_config={"save_every": save_every},
        told=lambda stage, found: note(f"{stage}: {_line(found)}"),
        answered=training.counter("parts of the target's answers"),
    )  # fmt: skip
    training.export(lm, params, output, step=begun.step)
    found = {"target": target, "settings": dataclasses.asdict(settings), "stages": reports}
    (output / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    note(f"wrote {output}; use it with: jaxinfer generate --model {target} --draft-model {output} --drafter draft")
    print_json(found)


def _begin(lm: Any, draft: str | None, layers: int | None, width: int | None, seed: int) -> Model:
    """The draft before its first stage: a given model, or random weights of the asked shape."""
    from jaxinfer.models import Step
    from jaxinfer.train import draft as recipe
    from jaxinfer.train.text import check_vocabulary

    if draft is not None:
        if layers is not None or width is not None:
            raise InputError("--layers, --width: got a shape and --draft; accepted: one of the two")
        given = training.load_target(draft)
        check_vocabulary(lm.tokenizer, given.tokenizer, name="the target", other_name=draft)
        return recipe.Model(given.step, given.params)
    config = lm.step.config
    head = config.head_dim
    default = max(head, config.hidden_size * 3 // 4 // head * head)
    shape = recipe.draft_config(config, layers=layers or max(1, config.num_layers // 4), width=width or default)
    step = Step(shape)
    return recipe.Model(step, recipe.init_params(step, seed))


def stages_of(text: str) -> tuple[tuple[str, int], ...]:
    """`text=300,code=400` as pairs."""
    found = []
    for part in text.split(","):
        name, _, steps = part.strip().partition("=")
        if not (steps.isascii() and steps.isdigit()):
            raise InputError(f"--stages: got {part!r}; accepted: name=updates, separated by commas: text=300,align=200")
        found.append((name, int(steps)))
    return tuple(found)


def temperatures_of(text: str) -> tuple[float, ...]:
    """`0,0.6,1` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--temperatures: got {text!r}; accepted: numbers separated by commas: 0,0.6,1") from None


def _line(found: dict[str, float]) -> str:
    return (
        f"{found['expected_acceptance']:.3f} of drafts accepted (expected), {found['greedy_acceptance']:.3f} greedy; "
        f"{found['greedy_block_efficiency']:.2f} tokens a forward, memory-bound speed-up "
        f"{found['greedy_memory_bound_speedup']:.2f}; {found['bits_per_byte']:.3f} bits per byte"
    )
