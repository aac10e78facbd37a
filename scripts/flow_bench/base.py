"""Flow matching itself, by Euler and Heun on uniform grids and on a shifted one: what every other method is beside."""

from flow_bench.bench import Bench, Entry, Sampler, fixed
from jaxinfer.flow.schedule import shift
from jaxinfer.flow.solve import heun


def samplers(bench: Bench, seed: int) -> list[Sampler]:
    """Euler with 1 to 32 steps; Heun, and Euler on the shifted grid, at some of these."""
    params, apply = bench.flow(seed), bench.network
    return [
        *(fixed(apply, params, "euler", k, more=bench.fit) for k in (1, 2, 4, 8, 16, 32)),
        *(fixed(apply, params, "heun", k, solver=heun) for k in (2, 4, 8)),
        *(fixed(apply, params, "euler, shifted grid", k, ts=shift(k)) for k in (4, 8)),
    ]


ENTRIES = [Entry("flow matching", samplers, many=True)]
