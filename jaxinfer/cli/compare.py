"""`jaxinfer compare`: methods side by side on one model and one input.

Stability: experimental.
"""

from typing import Annotated

import typer

from jaxinfer.cli import options

Methods = Annotated[str, typer.Option(help="Separated by commas; the first is what the others are held against.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times each method runs, in turns; medians are shown.")]


def compare(
    methods: Methods = "plain,draft",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; give it again for more. Default: Python code.")
    ] = None,
    input: options.InputFiles = None,
    model: options.Model = "tinycode",
    draft_model: options.DraftModel = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy, where exact methods agree to the token.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at a time.")] = 1,
    rounds: Rounds = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Time methods in turns on the same prompts: tokens a second, tokens a forward, and whether the answers are equal.

    A method is a drafter (plain, draft:gamma=4) or a format of weights or cache (int8-weights, int8-cache,
    sink-cache:window=256). The speed includes prefill and excludes compilation.

    \b
    Example:
      jaxinfer compare --model tinycode --methods plain,draft:gamma=2,draft:gamma=4,int8-weights
    """
    from jaxinfer.cli import one, side_by_side
    from jaxinfer.cli.output import print_json

    names = side_by_side.split(methods)
    parsed = [side_by_side.parse(name) for name in names]
    prompts = side_by_side.prompts_of(prompt, input)
    lm = one.prepare(
        model, options.draft_for(model, draft_model, ",".join(names)), options.format_of("auto", "auto"), None
    )
    report = side_by_side.measure_all(
        lm,
        parsed,
        prompts,
        rounds=rounds,
        batch_size=batch_size,
        seed=seed,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    if as_json:
        print_json(report)
    else:
        side_by_side.show(report)
