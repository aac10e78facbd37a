"""`jaxinfer train flow`: an autoencoder and a flow in its latents, on images.

Stability: experimental.
"""

from pathlib import Path
from typing import Annotated

import typer

from jaxinfer.cli import training


def flow(
    output: training.Output,
    data: Annotated[
        str, typer.Option("--data", help="glyphs (32x32, 36 classes), digits (8x8, 10), or an npz of images, labels.")
    ] = "glyphs",
    begin: Annotated[
        Path | None,
        typer.Option("--begin-from", help="Folder of a trained flow: its autoencoder and weights are kept."),
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="flow; meanflow, for samples in one step or a few.")
    ] = "flow",
    target_guidance: Annotated[
        float, typer.Option("--target-guidance", min=1, help="Guidance that meanflow has inside its targets.")
    ] = 1.0,
    condition: Annotated[
        str, typer.Option("--condition", help="class; inpaint or semantic: an image beside the noise as well.")
    ] = "class",
    steps: training.Steps = 4000,
    autoencoder_steps: Annotated[
        int, typer.Option("--autoencoder-steps", min=0, help="Updates of the autoencoder, before; 0: flow of pixels.")
    ] = 2000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images of an update.")] = 128,
    width: Annotated[int, typer.Option("--width", min=8, help="Channels of the transformer.")] = 192,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of the transformer.")] = 6,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads.")] = 4,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate.")] = 1e-3,
    drop_rate: Annotated[
        float, typer.Option("--drop-rate", min=0, max=1, help="How often the class is dropped; 0 forbids guidance.")
    ] = 0.1,
    snapshot_every: Annotated[
        int, typer.Option("--snapshot-every", min=1, help="Updates between two pictures of samples.")
    ] = 500,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train latent flow matching on images: first a small autoencoder, then the flow, with an EMA of its weights.

    While it trains, `flow/samples.png` and `flow/curve.png` are drawn anew; at the end the folder is a model for
    `jaxinfer sample` and `jaxinfer edit`.

    \b
    Example:
      jaxinfer train flow --data glyphs --output runs/glyphs --steps 4000
      jaxinfer train flow --begin-from runs/glyphs --objective meanflow --output runs/few --steps 2000
    """
    import dataclasses

    import jax

    from jaxinfer.cli import compiled
    from jaxinfer.cli.output import note, print_json
    from jaxinfer.errors import ConfigError
    from jaxinfer.flow import checkpoint
    from jaxinfer.flow import data as sets
    from jaxinfer.flow.model import FlowModel
    from jaxinfer.train import flow as recipes
    from jaxinfer.train import loop

    compiled.use_cache()
    recipes.image_channels(condition, 1)
    chosen = recipes.objective_of(objective, drop_rate=drop_rate, guidance=target_guidance)
    earlier = None if begin is None else checkpoint.load(begin)
    images = sets.load(data)
    training.check_writable(output)
    key = jax.random.key(seed)
    if earlier is None:
        config, params = None, None
        if autoencoder_steps:
            run = training.Run(output, autoencoder_steps, resume, save_every)
            config, params = recipes.train_autoencoder(run.train, images, autoencoder_steps, batch=batch, seed=seed)
        network = recipes.network_for(images, config, condition, hidden_size=width, num_layers=layers, num_heads=heads)
        start = network.init(jax.random.fold_in(key, 2))
    else:
        if (earlier.condition, earlier.classes) != (condition, images.classes):
            raise ConfigError(
                f"{begin} was trained with --condition {earlier.condition} on {len(earlier.classes)} classes"
            )
        config, params = earlier.autoencoder, earlier.autoencoder_params
        network, start = earlier.network, earlier.params
    velocity = "mean" if objective == "meanflow" else "instantaneous"
    model = FlowModel(network, start, config, params, images.classes, condition, drop_rate, velocity)
    recipe = recipes.flow_recipe(
        network, images, steps=steps, objective=chosen, autoencoder=config, autoencoder_params=params,
        condition=condition, batch=batch, rate=rate, seed=seed, begin=start,
        name=f"flow/{objective}/{target_guidance:g}/{drop_rate:g}",
    )  # fmt: skip
    recipe = dataclasses.replace(recipe, evaluate=recipes.Snapshot(model, output / "flow", images))
    state = loop.init_state(jax.tree.map(jax.numpy.array, start), recipe, jax.random.fold_in(key, 3))
    run = training.Run(output, steps, resume, save_every)
    state = run.train(recipe, state, "flow", log_every=10, evaluate_every=snapshot_every)
    model = dataclasses.replace(model, params=state.ema)
    checkpoint.save(output, model)
    note(f"wrote {output}: {sum(x.size for x in jax.tree.leaves(state.ema)):,} weights, pictures in {output / 'flow'}")
    print_json({"output": str(output), "classes": len(images.classes), "steps": int(state.step)})
