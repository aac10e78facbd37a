"""Fewer operations a step: blockwise flow matching with and without its feature residual, and CacheQuant.

Blockwise: four segments, a feature network of the flow's depth less one and velocity blocks of one layer; its features
are aligned to an encoder trained on the labels of the training data, which is not the metric's. CacheQuant: the trained
flow, all of whose layers but the last are run at some of the steps only, in int8, on lines fitted to 64 samples.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flow_bench.bench import Bench, Entry, Sampler, fixed
from flow_bench.few_steps import run
from jaxinfer import quant
from jaxinfer.flow import blockwise, cachequant
from jaxinfer.flow.alignment import AlignedFlowMatching, Projection, Warmup, decaying, graft
from jaxinfer.flow.blockwise import Blockwise
from jaxinfer.flow.blockwise_network import BlockwiseNetwork
from jaxinfer.flow.network import Network
from jaxinfer.flow.objective import FlowMatching
from jaxinfer.flow.schedule import uniform
from jaxinfer.flow.solve import euler
from jaxinfer.flow.split_network import SplitNetwork
from jaxinfer.flow.types import Condition
from jaxinfer.models.patch_encoder import Encoder, PatchEncoder
from jaxinfer.train import flow_methods

SEMANTIC = 32


def operations(program: Any, x: Any, labels: Any) -> float:
    """Floating-point operations a sample of a program without loops over steps, as the compiler counts them."""
    found: Any = jax.jit(program).lower(x, labels).compile().cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"]) / len(labels)


@functools.lru_cache(maxsize=4)
def encoder_of(bench: Bench, seed: int) -> tuple[Encoder, Any]:
    """The encoder that features are aligned to, and its params."""
    encoder = Encoder(PatchEncoder(len(bench.data.classes), patch=bench.network.config.patch, size=SEMANTIC))
    steps = max(200, bench.settings.tune_steps // 2)
    recipe = flow_methods.encoder_recipe(bench.recipe("encoder", seed, steps=steps), encoder)
    params = encoder.init(jax.random.key(77), jnp.zeros((1, *bench.network.shape)))
    return encoder, run(bench, recipe, params, steps, f"encoder-{seed}").params


def blocks(bench: Bench, seed: int) -> list[Sampler]:
    """Two steps a segment or more: with the feature network at each, and with its approximation."""
    s = bench.settings
    config = dataclasses.replace(bench.network.config, num_layers=max(1, s.num_layers - 1))
    network = BlockwiseNetwork(config, segments=4, velocity_layers=1, residual_layers=1, semantic_size=SEMANTIC)
    encoder, encoder_params = encoder_of(bench, 0)
    plain = bench.recipe("blockwise", seed, steps=s.steps, objective=Blockwise(), network=network)
    recipe = flow_methods.aligned_recipe(plain, encoder, encoder_params)
    params = run(bench, recipe, network.init(jax.random.key(seed)), s.steps, f"blockwise-{seed}").ema
    residual = flow_methods.residual_recipe(
        bench.recipe("blockwise", seed, steps=s.tune_steps, network=network), params
    )
    start = network.init_residual(jax.random.key(5))
    params = {**params, "residual": run(bench, residual, start, s.tune_steps, f"feature_residual-{seed}").ema}

    def sampler(steps: int, approximated: bool) -> Sampler:
        def solve(p, x, labels):
            return blockwise.sample(network, p, x, Condition(labels=labels), steps=steps, approximated=approximated).x

        program = jax.jit(solve)
        label = "feature residual" if approximated else "features at each step"
        total = 4 * steps
        return Sampler(label, total, total, lambda x, y: program(params, x, np.asarray(y)), cost(steps, approximated))

    x, labels = bench.inputs(8)
    h, t = jnp.zeros((8, config.num_patches, config.hidden_size)), jnp.full((8,), 0.5)
    block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    cond = lambda y: Condition(labels=y)  # noqa: E731
    feature = operations(lambda x, y: network.features(params, x, t, cond(y)), x, labels)
    rest = operations(lambda x, y: network.residual(params, x, t, cond(y)), x, labels)
    velocity = operations(lambda x, y: network.velocity(params, block, x, t, cond(y), h), x, labels)

    def cost(steps: int, approximated: bool) -> float:
        return 4 * (steps * velocity + feature + (steps - 1) * (rest if approximated else feature))

    # With one step a segment nothing is approximated.
    return [sampler(k, a) for k, a in ((1, False), (2, False), (4, False), (2, True), (4, True))]


def cached(bench: Bench, seed: int) -> list[Sampler]:
    """16 steps of Euler; all layers but the last at each, evenly spaced ones, the best ones, and those with lines."""
    params, config, n = bench.flow(seed), bench.network.config, 16
    split = SplitNetwork(config, 0, max(1, config.num_layers - 1))
    x, labels = bench.inputs(64, seed=900)
    cond = Condition(labels=jnp.asarray(labels))
    ts = uniform(n)
    rounded = quant.apply(params, [(r"block_\d+/(qkv|o|up|down)", quant.Int8())])
    table = cachequant.distances(split, params, x, ts, cond)
    t = jnp.full((8,), 0.5)
    few, few_labels = bench.inputs(8)
    h = jax.jit(split.deep)(params, few, t, Condition(labels=jnp.asarray(few_labels)))
    deep = operations(lambda x, y: split.deep(params, x, t, Condition(labels=y)), few, few_labels)
    shallow = operations(lambda x, y: split.shallow(params, x, t, Condition(labels=y), h), few, few_labels)

    @jax.jit
    def solve(p, plan, x, y):
        return cachequant.sample(split, p, x, Condition(labels=y), plan).x

    def sampler(label: str, plan: cachequant.Plan, weights: Any) -> Sampler:
        cost = plan.deep_runs * deep + n * shallow
        return Sampler(label, n, n, lambda x, y: solve(weights, plan, x, np.asarray(y)), cost)

    def whole(p, x, y):
        velocity = lambda x, t, carry: (bench.network(p, x, t, t, Condition(labels=y)).v, carry)  # noqa: E731
        return euler(velocity, x, ts).x

    program = jax.jit(whole)
    found = [Sampler("uncached", n, n, lambda x, y: program(params, x, np.asarray(y)))]
    found.append(Sampler("uncached, int8", n, n, lambda x, y: program(rounded, x, np.asarray(y))))
    for every in (2, 4):
        even = cachequant.uncorrected(ts, cachequant.evenly(n, every), config.hidden_size, config.channels)
        found.append(sampler(f"evenly, 1 in {every}", even, params))
        best = cachequant.schedule(table, every)
        plan = cachequant.uncorrected(ts, best, config.hidden_size, config.channels)
        found.append(sampler(f"best, 1 in {every}", plan, params))
        plan = cachequant.calibrate(split, params, x, ts, cond, best)
        found.append(sampler(f"best and lines, 1 in {every}", plan, params))
        plan = cachequant.calibrate(split, params, x, ts, cond, best, quantized=rounded)
        found.append(sampler(f"best and lines, 1 in {every}, int8", plan, rounded))
    return found


def warmed(bench: Bench, seed: int) -> list[Sampler]:
    """ERW: a sixth of the flow's updates on the first half of the layers alone, the rest on the whole model."""
    s, config = bench.settings, bench.network.config
    depth = max(1, config.num_layers // 2)
    encoder, encoder_params = encoder_of(bench, 0)
    project = Projection(2 * config.hidden_size, SEMANTIC)
    front = Network(dataclasses.replace(config, num_layers=depth), taps=(depth - 1,))
    whole = Network(config, taps=(depth - 1,))
    first, rest = s.steps // 6, s.steps - s.steps // 6
    head = project.init(jax.random.key(8), config.hidden_size)
    recipe = flow_methods.aligned_recipe(
        bench.recipe("erw_warm_up", seed, steps=first, objective=Warmup(project), network=front),
        encoder,
        encoder_params,
    )
    start = {"network": front.init(jax.random.key(seed)), "project": head}
    warm = run(bench, recipe, start, first, f"erw_warm_up-{seed}").ema
    objective = AlignedFlowMatching(project, FlowMatching())
    plain = bench.recipe("erw", seed, steps=rest, objective=objective, network=whole)
    recipe = flow_methods.aligned_recipe(plain, encoder, encoder_params, weight=decaying(0.5, half_life=rest / 6))
    begun = {"network": graft(whole.init(jax.random.key(seed)), warm["network"]), "project": warm["project"]}
    params = run(bench, recipe, begun, rest, f"erw-{seed}").ema["network"]
    return [fixed(bench.network, params, "euler", k) for k in (1, 2, 4, 8, 16)]


ENTRIES = [Entry("blockwise", blocks), Entry("CacheQuant", cached), Entry("ERW", warmed)]
