"""`jaxinfer train hamburger`: a model that reads and writes several tokens as one step.

Stability: experimental.
"""

from typing import Annotated

import typer

from jaxinfer.cli import training


def hamburger(
    output: training.Output,
    target: training.Target = "tinycode",
    data: training.Data = None,
    steps: training.Steps = 200,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate of the new parts.")] = 4e-3,
    base_rate: Annotated[float, typer.Option("--base-rate", min=0, help="The base's share of that rate.")] = 0.25,
    size: Annotated[int, typer.Option("--size", min=2, help="Most tokens of a group.")] = 4,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of the micro-step decoder.")] = 2,
    low: Annotated[float, typer.Option("--low", min=0, help="Entropy in nats below which a token joins.")] = 0.05,
    ratio: Annotated[float, typer.Option("--ratio", min=0, help="Or this share of its group's largest.")] = 0.3,
    copies: Annotated[float, typer.Option("--copies", min=0, max=1, help="Windows that repeat a stretch.")] = 0.3,
    batch_tokens: training.BatchTokens = 2048,
    length: training.Length = 256,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train HAMburger around a model: a merging embedder and a micro-step decoder, the model itself at a lower rate.

    The result is a model like any other with `hamburger.json` and `hamburger.safetensors` beside it, for
    `jaxinfer.decode.hamburger` (Python: `jaxinfer.models.hamburger.load_parts`).

    \b
    Example:
      jaxinfer train hamburger --target tinycode --output runs/hamburger
    """
    import jax
    import jax.numpy as jnp

    from jaxinfer.cli.output import note, print_json
    from jaxinfer.models.hamburger import Hamburger, save_parts
    from jaxinfer.train import hamburger as recipes
    from jaxinfer.train import lm, loop

    run = training.Run(output, steps, resume, save_every)
    loaded = training.load_target(target)
    text = training.load_text(data, loaded)
    model = Hamburger(loaded.step, size=size, layers=layers)
    schedule = lm.warmup_stable_decay(rate, steps=steps, warmup=max(1, min(20, steps // 4)), decay=0.6)
    recipe = recipes.recipe(
        model, loaded.params, text.stream(lm.stages([(length, 1.0, 0.9)], steps=steps, tokens=batch_tokens), seed=seed,
                                          copies=copies),
        schedule=schedule, base_rate=base_rate, low=low, ratio=ratio,
        identity={"target": target, "text": text.digest, "rate": rate, "layers": layers, "copies": copies},
    )  # fmt: skip
    params = model.init(jax.random.key(seed), jax.tree.map(jnp.array, loaded.params))  # the loop updates in place
    state = run.train(recipe, loop.init_state(params, recipe, jax.random.key(seed + 1)))
    training.export(loaded, state.params["base"], output)
    save_parts(output, model, state.params)
    before, after = (text.bits_per_byte(loaded.step, p, documents=16) for p in (loaded.params, state.params["base"]))
    note(f"wrote {output}: {before:.3f} bits per byte of held-out text before, {after:.3f} after, token by token")
    print_json({"output": str(output), "bits_per_byte_before": before, "bits_per_byte": after})
