"""`jaxinfer train first`: routers that skip layers by the prompt, and adapters that make up for the layers skipped.

Stability: experimental.
"""

from typing import Annotated

import typer

from jaxinfer.cli import training


def first(
    output: training.Output,
    target: training.Target = "tinycode",
    data: training.Data = None,
    steps: training.Steps = 200,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate of the adapters.")] = 3e-3,
    router_steps: Annotated[int, typer.Option("--router-steps", min=1, help="Updates of the routers, before.")] = 100,
    router_rate: Annotated[float, typer.Option("--router-rate", min=0, help="Learning rate of the routers.")] = 2e-3,
    penalty: Annotated[float, typer.Option("--penalty", min=0, help="Loss of a layer that is run, in nats.")] = 0.01,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapters.")] = 6,
    batch_tokens: training.BatchTokens = 4096,
    length: training.Length = 256,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train FiRST: first routers on the frozen model, then LoRA adapters under these routers.

    The folder holds `first.safetensors`, and the adapter in `adapter/`; `jaxinfer.decode.first.load_first` reads both.

    \b
    Example:
      jaxinfer train first --target tinycode --output runs/first --penalty 0.02
    """
    import jax
    import optax

    from jaxinfer import quant
    from jaxinfer.cli.output import note, print_json
    from jaxinfer.decode.first import open_routers, save_routers
    from jaxinfer.models.adapters import save_adapter
    from jaxinfer.train import first as recipes
    from jaxinfer.train import lm, loop

    model = training.load_target(target)
    text = training.load_text(data, model)
    stream = text.stream(lm.stages([(length, 1.0, 1.0)], steps=steps, tokens=batch_tokens), seed=seed)
    common = {"data": recipes.Prompted(stream, seed=seed), "tokens": lambda batch: batch["ids"].size}
    named = {"target": target, "text": text.digest, "seed": seed, "router_rate": router_rate, "penalty": penalty}
    routers = loop.Recipe(
        objective=recipes.Routers(model.step, penalty), optimizer=optax.adam(router_rate), frozen=model.params,
        identity={"recipe": "first/routers", **named, "router_steps": router_steps}, **common,
    )  # fmt: skip
    state = loop.init_state(open_routers(model.step.config), routers, jax.random.key(seed))
    state = training.Run(output, router_steps, resume, save_every).train(routers, state, "routers")
    chosen = {**model.params, "first": state.params}
    save_routers(output, chosen)
    rules = [(r"layers_.*", quant.Lora(rank=rank))]
    trained, frozen = quant.split(quant.adapt(chosen, rules, jax.random.key(seed)))
    schedule = lm.warmup_stable_decay(rate, steps=steps, warmup=max(1, min(20, steps // 4)), decay=0.5)
    adapted = loop.Recipe(
        objective=recipes.Adapted(model.step), optimizer=lm.muon(schedule), schedule=schedule, frozen=frozen,
        identity={"recipe": "first/adapters", **named, "rate": rate, "rank": rank, "router_steps": router_steps},
        **common,
    )  # fmt: skip
    state = loop.init_state(trained, adapted, jax.random.key(seed))
    state = training.Run(output, steps, resume, save_every).train(adapted, state, "adapters")
    params = {k: v for k, v in quant.join(state.params, frozen).items() if k != "first"}
    save_adapter(model.step.config, params, output / "adapter", base_name=target)
    note(f"wrote {output}")
    print_json({"output": str(output)})
