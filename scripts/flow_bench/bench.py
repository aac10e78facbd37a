"""What every method of the flow benchmark shares: data, autoencoder, metric, the network's size, training that resumes.

A method is an `Entry`: a name, for how many seeds it is trained, and `samplers(bench, seed)`, which trains what it
needs (`Bench.train` goes on where a run was killed) and returns what is to be measured, a `Sampler` for each number of
steps. All methods start from the same noise and labels, and are measured by the same classifier.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.evals.classifier import Classifier, evaluate, train_classifier
from jaxinfer.evals.distances import frechet_distance
from jaxinfer.flow import data as sets
from jaxinfer.flow.guide import unguided
from jaxinfer.flow.model import source
from jaxinfer.flow.network import Network
from jaxinfer.flow.schedule import uniform
from jaxinfer.flow.solve import FixedStep, euler
from jaxinfer.flow.types import Apply, Condition, Objective
from jaxinfer.models import autoencoder as vae
from jaxinfer.train import flow as recipes
from jaxinfer.train import loop


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large everything is. `tune_steps`: of methods that begin from the trained flow. `seeds`: of the flow, of
    MeanFlow and of BOSS; other methods have one. `rounds`: how often sampling is timed, the median counts."""

    data: str
    steps: int
    tune_steps: int
    autoencoder_steps: int
    classifier_steps: int
    samples: int
    seeds: int
    rounds: int = 3
    batch: int = 128
    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4

    @property
    def sizes(self) -> dict[str, Any]:
        """Of the network."""
        return {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "num_heads": self.num_heads}


QUICK = Settings(
    "digits", steps=300, tune_steps=100, autoencoder_steps=0, classifier_steps=600, samples=360, seeds=1,
    rounds=1, batch=64, hidden_size=64, num_layers=3,
)  # fmt: skip
FULL = Settings(
    "glyphs", steps=1800, tune_steps=400, autoencoder_steps=1000, classifier_steps=1000, samples=1080, seeds=3
)
LARGE = dataclasses.replace(FULL, steps=6000, tune_steps=3000, samples=2160, batch=256, hidden_size=256, num_layers=8)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`run(x[B,h,w,c], labels i32[B]) -> latents`, jitted, with the model's evaluations a sample.

    flops: of a sample, where that is not `evaluations` times one evaluation of the flow's network. more: what else the
    row says, from the images and labels.
    """

    label: str
    steps: int
    evaluations: float
    run: Callable[[jax.Array, Any], jax.Array]
    flops: float | None = None
    more: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method of the table. `many`: it is trained for each of the settings' seeds, otherwise for one."""

    name: str
    samplers: Callable[[Bench, int], list[Sampler]]
    many: bool = False


class Bench:
    """One run of the benchmark, with its files below `folder`."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.data, self.test = sets.load(settings.data, "train"), sets.load(settings.data, "test")
        self.autoencoder: vae.AutoencoderConfig | None = None
        self.autoencoder_params: Any = None

    def prepare(self) -> None:
        """The metric's classifier (of both splits' classes, seed 0), and the autoencoder."""
        s = self.settings
        shift = 1 if self.data.images.shape[1] >= 16 else 0
        self.classifier: Classifier = train_classifier(
            self.data.images, self.data.labels, len(self.data.classes), steps=s.classifier_steps, shift=shift
        )
        if s.autoencoder_steps:

            def run(recipe, state, name, **changes):
                return loop.train(recipe, state, self._config(s.autoencoder_steps), self.folder / name)

            found = recipes.train_autoencoder(run, self.data, s.autoencoder_steps, batch=s.batch)
            self.autoencoder, self.autoencoder_params = found

    @functools.cached_property
    def network(self) -> Network:
        """The network of every method that does not bring its own."""
        return recipes.network_for(self.data, self.autoencoder, **self.settings.sizes)

    def _config(self, steps: int) -> loop.LoopConfig:
        return loop.LoopConfig(steps=steps, log_every=50, save_seconds=60.0, keep=1, curve=False)

    def recipe(self, name: str, seed: int, *, steps: int, objective: Any = None, **changes: Any):
        """The flow recipe of this benchmark's data and size; `changes` are of `flow_recipe`."""
        return recipes.flow_recipe(
            changes.pop("network", self.network), self.data, steps=steps, objective=objective, name=name,
            autoencoder=self.autoencoder, autoencoder_params=self.autoencoder_params, batch=self.settings.batch,
            seed=seed, **changes,
        )  # fmt: skip

    def train(
        self,
        name: str,
        seed: int,
        *,
        objective: Objective | None = None,
        start: Any = None,
        steps: int | None = None,
        **changes: Any,
    ) -> Any:
        """The averaged weights of `name` after training from `start` (default: random weights), for `tune_steps` or
        `steps`. A run that was done, or killed, is gone on with."""
        steps = steps or (self.settings.steps if start is None else self.settings.tune_steps)
        recipe = self.recipe(name, seed, steps=steps, objective=objective, **changes)
        network = changes.get("network", self.network)
        params = network.init(jax.random.key(seed)) if start is None else start
        params = jax.tree.map(jax.numpy.array, params)  # the loop donates what it is given
        state = loop.init_state(params, recipe, jax.random.key(1000 + seed))
        return loop.train(recipe, state, self._config(steps), self.folder / f"{name}-{seed}").ema

    def flow(self, seed: int) -> Any:
        """The flow-matching weights that other methods begin from."""
        return self.train("flow", seed)

    def inputs(self, rows: int | None = None, seed: int = 0) -> tuple[jax.Array, np.ndarray]:
        """The noise and the labels of the samples. The noise is held to its device, as what samplers return is: steps
        that feed on their own results are compiled once."""
        rows = rows or self.settings.samples
        labels = np.arange(rows, dtype=np.int32) % len(self.data.classes)
        x = source(jax.random.key(10_000 + seed), rows, self.network.shape)
        return jax.device_put(x, jax.devices()[0]), labels

    def images(self, latents: jax.Array) -> np.ndarray:
        """What latents are decoded to."""
        if self.autoencoder is None:
            return np.clip(np.asarray(latents), -1, 1)
        return np.clip(np.asarray(vae.decode(self.autoencoder, self.autoencoder_params, latents)), -1, 1)

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Quality against as many held-out images."""
        order = np.random.default_rng(0).permutation(len(self.test.images))[: self.settings.samples]
        return evaluate(self.classifier, self.test.images[order], self.test.labels[order], images, labels)

    def fit(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The distance to training images, which tells how well their law was learned: below the train-test floor, the
        distance to held-out ones does not."""
        _, others = self._training_rows()
        truth = self.classifier.features(self.data.images[others])
        return {"training_distance": frechet_distance(truth, self.classifier.features(images))}

    def floor(self) -> dict[str, dict[str, float]]:
        """What training images score against held-out ones and other training images, and after the autoencoder."""
        rows, _ = self._training_rows()
        images, labels = self.data.images[rows], self.data.labels[rows]
        sets = {"train-test floor": images}
        if self.autoencoder is not None:
            sets["autoencoder floor"] = self.images(vae.encode(self.autoencoder, self.autoencoder_params, images))
        return {name: {**self.score(found, labels), **self.fit(found, labels)} for name, found in sets.items()}

    def _training_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint choices of training images, as many as samples."""
        order, count = np.random.default_rng(1).permutation(len(self.data.images)), self.settings.samples
        return order[:count], order[count : 2 * count]

    def flops(self, apply: Apply, params: Any, rows: int = 8) -> float:
        """Floating-point operations of one evaluation of `apply`, a sample, as the compiler counts them."""
        x, labels = self.inputs(rows)
        t = jax.numpy.full((rows,), 0.5)
        compiled = jax.jit(lambda p, x, t, c: apply(p, x, t, t, c).v).lower(params, x, t, Condition(labels=labels))
        found: Any = compiled.compile().cost_analysis()
        return float((found[0] if isinstance(found, list) else found)["flops"]) / rows


@functools.partial(jax.jit, static_argnames=("apply", "velocity_of", "solver"))
def _interval(apply, velocity_of, solver, params, x, labels, ts):
    return solver(velocity_of(apply, params, Condition(labels=labels)), x, ts).x


def fixed(
    apply: Apply,
    params: Any,
    label: str,
    steps: int,
    *,
    solver: FixedStep = euler,
    ts: Any = None,
    velocity_of: Callable[..., Any] = unguided,
    more: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
) -> Sampler:
    """Unguided sampling by a fixed-step solver over a grid, uniform by default: one jitted step, called for each
    interval, so that all grids and all methods of a network share a program (compiling is most of the quick set)."""
    grid = uniform(steps) if ts is None else np.asarray(ts, np.float32)

    def run(x, labels):
        for t, s in itertools.pairwise(grid):
            x = _interval(apply, velocity_of, solver, params, x, labels, np.stack([t, s]))
        return x

    return Sampler(label, steps, steps * solver.evaluations, run, more=more)
