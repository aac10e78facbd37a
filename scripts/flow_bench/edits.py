"""Held-out images made into their class's next one: inversion and forward again, and FlowOpt from there.

Both go back to time 0.3 only, in 8 steps of Euler. `change`: how far the result is from the image that it was, a pixel
in [-1, 1]; what an edit should keep low while its accuracy, of the new class, is high. FlowOpt's evaluations include
those that estimate its step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flow_bench.bench import Bench, Entry, Sampler
from jaxinfer.flow import flowopt, inversion
from jaxinfer.flow.guide import unguided
from jaxinfer.flow.schedule import uniform
from jaxinfer.flow.solve import euler
from jaxinfer.flow.types import Condition
from jaxinfer.models import autoencoder as vae

STEPS, START, ITERATIONS, POWER = 8, 0.3, 8, 4


def originals(bench: Bench, labels: np.ndarray) -> np.ndarray:
    """A held-out image f32[N,H,W,C] of the class before each of `labels`: another one each time that a class returns,
    as long as there are any."""
    classes, found = len(bench.data.classes), np.zeros(len(labels), np.int64)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        of_class = np.flatnonzero(bench.test.labels == (label - 1) % classes)
        found[rows] = of_class[np.arange(len(rows)) % len(of_class)]
    return bench.test.images[found]


def edits(bench: Bench, seed: int) -> list[Sampler]:
    """The samples are the edited images; the noise that samples start from is not used."""
    params, grid = bench.flow(seed), inversion.from_time(uniform(STEPS), START)
    classes = len(bench.data.classes)

    def velocity(p: Any, labels: Any) -> Any:
        return unguided(bench.network, p, Condition(labels=labels))

    @jax.jit
    def plain(p, y, before, after):
        return inversion.edit(euler, velocity(p, before), velocity(p, after), y, grid)

    @jax.jit
    def refined(p, y, before, after):
        forward = lambda x: euler(velocity(p, after), x, grid).x  # noqa: E731
        key = jax.random.key(seed)
        return flowopt.edit(velocity(p, before), forward, y, grid, key, iterations=ITERATIONS, power=POWER)[0]

    def run(edit: Any):
        def of_images(_, labels):
            images = originals(bench, np.asarray(labels))
            y = images if bench.autoencoder is None else vae.encode(bench.autoencoder, bench.autoencoder_params, images)
            return edit(params, jnp.asarray(y), jnp.asarray((labels - 1) % classes), jnp.asarray(labels))

        return of_images

    def change(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"change": float(np.abs(images - originals(bench, labels)).mean())}

    # An inversion by fixed points, the power iteration's forward products at two evaluations each, and the solves.
    evaluations = STEPS * (2 + 2 * (POWER + 1) + ITERATIONS + 1)
    return [
        Sampler("inversion, euler", STEPS, 2 * STEPS, run(plain), more=change),
        Sampler(f"FlowOpt, {ITERATIONS} iterations", STEPS, evaluations, run(refined), more=change),
    ]


ENTRIES = [Entry("edit", edits)]
