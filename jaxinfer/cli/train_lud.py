"""`jaxinfer train lud`: a model that guesses past its next token, for `--drafter lud`.

Stability: experimental.
"""

from typing import Annotated

import typer

from jaxinfer.cli import training


def lud(
    output: training.Output,
    target: training.Target = "tinycode",
    data: training.Data = None,
    steps: training.Steps = 300,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate.")] = 1e-3,
    k: Annotated[int, typer.Option("--k", min=2, help="Most tokens that one forward will give.")] = 4,
    theta: Annotated[float, typer.Option("--theta", min=0, max=1, help="Least probability of a unit's tokens.")] = 0.9,
    examples: Annotated[int, typer.Option("--examples", min=1, help="PAD examples behind each window.")] = 32,
    outside: Annotated[
        float, typer.Option("--outside", min=0, max=1, help="Weight of PADs that no unit covers (the paper: 0).")
    ] = 0.25,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Train LoRA adapters of this rank; 0: all weights.")] = 0,
    batch_tokens: training.BatchTokens = 4096,
    length: training.Length = 256,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train a model on lexical units: its own sure tokens, guessed from PADs, beside ordinary next-token examples.

    The result is a model like any other, whose guesses `--drafter lud:k=4,theta=0.9` keeps. With `--rank` the adapter
    alone is below it too, in `adapter/`.

    \b
    Example:
      jaxinfer train lud --target tinycode --output runs/lud
      jaxinfer generate --model runs/lud --drafter lud --prompt "def main():"
    """
    import jax
    import jax.numpy as jnp

    from jaxinfer import quant
    from jaxinfer.cli.output import note, print_json
    from jaxinfer.errors import InputError
    from jaxinfer.models.adapters import save_adapter
    from jaxinfer.train import lm, loop
    from jaxinfer.train.lud import LexicalUnits, PadTokens, Units

    run = training.Run(output, steps, resume, save_every)
    model = training.load_target(target)
    pad = model.tokenizer.pad_id
    if pad in model.step.eos:
        raise InputError(f"--target: got {target}, whose PAD token {pad} ends a text; accepted: one with its own PAD")
    text = training.load_text(data, model)
    units = Units(k=k, theta=theta, pad=pad, examples=examples, outside=outside)
    trained, frozen = jax.tree.map(jnp.array, model.params), None  # a copy: the loop updates in place
    if rank:
        rules = [(r"layers_.*", quant.Lora(rank=rank))]
        trained, frozen = quant.split(quant.adapt(model.params, rules, jax.random.key(seed)))
    stream = text.stream(lm.stages([(length, 1.0, 1.0)], steps=steps, tokens=batch_tokens), seed=seed)
    schedule = lm.warmup_stable_decay(rate, steps=steps, warmup=max(1, min(20, steps // 4)), decay=0.5)
    recipe = loop.Recipe(
        objective=PadTokens(model.step),
        data=LexicalUnits(stream, model.step, model.params, units, seed=seed),
        optimizer=lm.muon(schedule),
        frozen=frozen,
        schedule=schedule,
        tokens=lambda batch: batch["ids"].size,
        identity={
            "recipe": "lud", "target": target, "text": text.digest, "seed": seed, "rate": rate, "k": k, "theta": theta,
            "examples": examples, "outside": outside, "rank": rank,
        },
    )  # fmt: skip
    state = run.train(recipe, loop.init_state(trained, recipe, jax.random.key(seed)))
    params = state.params
    if rank:
        params = quant.join(params, frozen)
        save_adapter(model.step.config, params, output / "adapter", base_name=target)
        params = quant.merge(params)
    training.export(model, params, output)
    before, after = (text.bits_per_byte(model.step, tree, documents=16) for tree in (model.params, params))
    note(f"wrote {output}: {before:.3f} bits per byte of held-out text before, {after:.3f} after")
    print_json({"output": str(output), "bits_per_byte_before": before, "bits_per_byte": after})
