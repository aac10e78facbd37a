"""`jaxinfer train lm`: next-token training of a model on one's own text.

Stability: experimental.
"""

from typing import Annotated

import typer

from jaxinfer.cli import cluster, training

REMAT_HELP = """What layers keep for the backward pass: none (of it is computed again), dots, names, full (all but a
layer's input is), host (the input is in the host's memory too)."""


@cluster.clustered
def lm(
    output: training.Output,
    target: training.Target = "tinycode",
    data: training.Data = None,
    steps: training.Steps = 200,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate.")] = 1e-3,
    batch_tokens: training.BatchTokens = 4096,
    length: training.Length = 512,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
    remat: Annotated[str, typer.Option("--remat", help=" ".join(REMAT_HELP.split()))] = "none",
) -> None:
    """Go on training a model on text: next-token cross-entropy on packed windows, Muon, warm-up and linear decay.

    \b
    Example:
      jaxinfer train lm --target tinycode --data src/ --output runs/mine --steps 200
    Over several machines, each with its own number (or, under SLURM, --coordinator auto):
      jaxinfer train lm ... --coordinator node1:1234 --processes 2 --process-id 0
    """
    import jax

    from jaxinfer.cli.output import note, print_json
    from jaxinfer.train import lm as recipes
    from jaxinfer.train import loop
    from jaxinfer.train.remat import remat as rematerialised

    run = training.Run(output, steps, resume, save_every)
    model = training.load_target(target)
    step = rematerialised(model.step, remat)
    text = training.load_text(data, model)
    schedule = recipes.warmup_stable_decay(rate, steps=steps, warmup=max(1, min(50, steps // 4)))
    recipe = loop.Recipe(
        objective=recipes.NextToken(step),
        data=text.stream(recipes.stages([(length, 1.0, 1.0)], steps=steps, tokens=batch_tokens), seed=seed),
        optimizer=recipes.muon(schedule),
        schedule=schedule,
        evaluate=lambda params: {"bits_per_byte": text.bits_per_byte(model.step, params, documents=16)},
        tokens=lambda batch: batch["ids"].size,
        identity={"recipe": "lm", "target": target, "text": text.digest, "seed": seed, "rate": rate},
    )
    state = loop.init_state(model.params, recipe, jax.random.key(seed))
    before = text.bits_per_byte(model.step, model.params, documents=16)
    state = run.train(recipe, state, evaluate_every=100)
    training.export(model, state.params, output)
    after = text.bits_per_byte(model.step, state.params, documents=16)
    if jax.process_index():
        return
    note(f"wrote {output}: {before:.3f} bits per byte of held-out text before, {after:.3f} after")
    print_json({"output": str(output), "bits_per_byte_before": before, "bits_per_byte": after})
