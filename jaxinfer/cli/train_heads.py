"""`jaxinfer train heads`: a draft head for a frozen model, on one's own text.

Stability: experimental.
"""

from typing import Annotated, Any

import typer

from jaxinfer.cli import training
from jaxinfer.cli.specs import Registry
from jaxinfer.errors import InputError


def heads(
    output: training.Output,
    kind: Annotated[str, typer.Option("--kind", help="The kind of head, with settings: medusa:heads=3.")] = "medusa",
    target: training.Target = "tinycode",
    data: training.Data = None,
    steps: training.Steps = 600,
    objective: Annotated[
        str, typer.Option("--objective", help="own, or specvlm: its losses and optimiser, for --kind eagle.")
    ] = "own",
    rate: Annotated[
        float | None, typer.Option("--rate", min=0, help="Peak learning rate. Default: 3e-3, of specvlm 8e-5.")
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            "--distill", min=0, max=1, help="Weight of the target's own law; the rest is the text's. Default: 1."
        ),
    ] = None,
    features: Annotated[
        float | None,
        typer.Option(
            "--features", min=0, help="Weight of the loss on features, for heads that predict them. Default: 1."
        ),
    ] = None,
    batch_tokens: training.BatchTokens = 2048,
    length: training.Length = 256,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train a draft head that guesses a frozen model's next tokens; `generate --drafter KIND` then uses it.

    \b
    Example:
      jaxinfer train heads --kind medusa --target tinycode --output runs/medusa
      jaxinfer generate --drafter medusa --draft-model runs/medusa --prompt "def f(x):"
    """
    import jax

    from jaxinfer.cli.output import note, print_json
    from jaxinfer.models.heads import HEADS, TargetShape, save_head
    from jaxinfer.train import heads as recipes
    from jaxinfer.train import lm, loop, specvlm

    if objective not in ("own", "specvlm"):
        raise InputError(f"--objective: got {objective!r}; accepted: own, specvlm")
    if objective == "specvlm" and (distill is not None or features is not None):
        raise InputError(
            "--distill, --features: got weights with --objective specvlm; accepted: with own, it has its own"
        )
    run = training.Run(output, steps, resume, save_every)
    model = training.load_target(target)
    head: Any = Registry("--kind", HEADS).parse(kind, target=TargetShape.of(model.config))
    text = training.load_text(data, model)
    stream = text.stream(lm.stages([(length, 1.0, 0.9)], steps=steps, tokens=batch_tokens), seed=seed)
    common: dict[str, Any] = {
        "steps": steps,
        "held_out": recipes.held_out_batch(text.held_out, length=length, end=text.end),
        "identity": {"text": text.digest, "seed": seed, "target": loop.fingerprint(model.params)},
    }
    given = (model.step, model.params, head, stream)
    if objective == "specvlm":
        recipe = specvlm.recipe(*given, rate=specvlm.RATE if rate is None else rate, **common)
    else:
        losses = recipes.Losses(1.0 if distill is None else distill, 1.0 if features is None else features)
        recipe = recipes.recipe(*given, rate=3e-3 if rate is None else rate, losses=losses, **common)
    state = recipes.init_state(model.step, model.params, head, recipe, jax.random.key(seed))
    state = run.train(recipe, state, evaluate_every=100)
    head = recipes.measured(model.step, model.params, head, state.params, text.train)
    save_head(output, head, state.params, model.params)
    assert recipe.evaluate is not None
    found = dict(recipe.evaluate(state.params))
    note(f"wrote {output}: of the target's choices on held-out text the head has {found['agree_1']:.0%} one ahead")
    print_json({"output": str(output), "kind": head.kind, "settings": head.settings(), **found})
