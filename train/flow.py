"""The recipes of latent flow matching: the autoencoder, and the flow in its latents, on the one training loop.

First the autoencoder (pixel error and a small Kullback-Leibler term), whose latents are then scaled to variance 1;
then the flow, by any objective of the flow slots, with an EMA of its weights. Both are Adam with warm-up and a linear
decay. Dao, Phung, Nguyen, Tran 2023 (arXiv:2307.08698): EMA 0.9999 over some 1e5 updates, conditions dropped for 10 %
of the rows; here the EMA is 0.999, for runs of thousands of updates. Latents are drawn from the posterior anew at each
update, as there.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.evals import picture
from jaxinfer.flow import inpaint, schedule
from jaxinfer.flow.data import Images
from jaxinfer.flow.meanflow import MeanFlow, TargetGuidance
from jaxinfer.flow.model import CONDITIONS, FlowModel
from jaxinfer.flow.network import Network
from jaxinfer.flow.objective import FlowMatching
from jaxinfer.flow.times import WIDE_PAIRS
from jaxinfer.flow.types import Batch, Condition, Objective, per_example
from jaxinfer.models import autoencoder as vae
from jaxinfer.models.autoencoder import AutoencoderConfig
from jaxinfer.models.dit import DitConfig
from jaxinfer.train import metrics as record
from jaxinfer.train.lm import warmup_stable_decay
from jaxinfer.train.loop import Recipe, TrainState, fingerprint, init_state


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Data as a function of the completed updates: every row once an epoch, in an order of its own; what is left at
    the end of an epoch is not used in it."""

    arrays: Mapping[str, np.ndarray]
    batch: int
    seed: int

    def __post_init__(self):
        rows = {name: len(value) for name, value in self.arrays.items()}
        if not 1 <= self.batch <= min(rows.values()):
            raise ConfigError(f"a batch of {self.batch} rows from {rows} is not possible")

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        count = len(next(iter(self.arrays.values())))
        epoch, place = divmod(step, count // self.batch)
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        rows = order[place * self.batch : (place + 1) * self.batch]
        return {name: value[rows] for name, value in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The autoencoder's objective on {"images": f32[B,H,W,C]}: mean squared error a pixel, and `kl_weight` times the
    divergence of the posterior from a standard normal, a latent number."""

    config: AutoencoderConfig
    kl_weight: float = 1e-4

    def __call__(self, params, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = batch["images"]
        mean, log_variance = vae.posterior(self.config, params, images)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
        again = vae.Autoencoder(self.config).apply({"params": params}, z, method="decode")
        error = per_example(jnp.square(jnp.asarray(again) - images)).mean()
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        return error + self.kl_weight * kl, {"pixel_error": error, "kl": kl}


def adam(rate: float, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam with gradients clipped at norm 1, and its schedule: warm-up, constant, linear decay over the last 30 %."""
    planned = warmup_stable_decay(rate, steps=steps, warmup=max(1, min(200, steps // 10)))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(planned)), planned


def autoencoder_recipe(
    config: AutoencoderConfig, images: np.ndarray, *, steps: int, batch: int = 128, rate: float = 2e-3, seed: int = 0
) -> Recipe:
    """Trains `vae.init(config, key)` on images f32[N,H,W,C] in [-1, 1]."""
    optimizer, planned = adam(rate, steps)
    return Recipe(
        objective=Reconstruction(config),
        data=Epochs({"images": images}, batch, seed),
        optimizer=optimizer,
        schedule=planned,
        identity={"recipe": "autoencoder", "seed": seed, "rate": rate, "batch": batch, "config": str(config)},
    )


def train_autoencoder(
    run: Callable[..., TrainState], data: Images, steps: int, *, batch: int = 128, seed: int = 0
) -> tuple[AutoencoderConfig, Any]:
    """The scaled configuration and the params of an autoencoder for the set's images. `run(recipe, state, name,
    **loop settings)` trains, as `jaxinfer.train.loop.train` does."""
    shape = data.images.shape[1:]
    config = AutoencoderConfig(*shape, patch=4 if min(shape[:2]) >= 16 else 2)
    recipe = autoencoder_recipe(config, data.images, steps=steps, batch=batch, seed=seed)
    state = init_state(vae.init(config, jax.random.key(seed)), recipe, jax.random.key(seed + 1))
    params = run(recipe, state, "autoencoder", log_every=20).params
    return fit_scale(config, params, data.images), params


def fit_scale(config: AutoencoderConfig, params: Any, images: np.ndarray) -> AutoencoderConfig:
    """`config` with the scale that brings posterior draws of the images to variance 1."""
    mean, log_variance = latents(config, params, images)
    variance = np.var(mean) + np.exp(log_variance).mean()
    return dataclasses.replace(config, scale=round(float(variance**-0.5), 5))


def latents(config: AutoencoderConfig, params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log-variance f32[N,h,w,c] of images, unscaled, on the host."""
    run = jax.jit(lambda params, images: vae.posterior(config, params, images))
    parts = [run(params, images[i : i + 512]) for i in range(0, len(images), 512)]
    mean, log_variance = zip(*jax.device_get(parts), strict=True)
    return np.concatenate(mean), np.concatenate(log_variance)


@dataclasses.dataclass(frozen=True)
class FlowObjective:
    """A flow objective on what `flow_arrays` gives; `frozen` are the autoencoder's params, where there is one."""

    network: Network
    objective: Objective
    autoencoder: AutoencoderConfig | None = None
    condition: str = "class"

    def __call__(self, params, batch, key, frozen=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        draw_key, hole_key, key = jax.random.split(key, 3)
        if self.autoencoder is None:
            x1 = batch["images"]
        else:
            noise = jax.random.normal(draw_key, batch["mean"].shape, batch["mean"].dtype)
            x1 = (batch["mean"] + jnp.exp(0.5 * batch["log_variance"]) * noise) * self.autoencoder.scale
        cond = Condition(labels=batch.get("labels"), image=self._image(batch, hole_key, frozen))
        return self.objective(self.network, params, key, Batch(x1, cond))

    def _image(self, batch, key, frozen):
        if self.condition == "class":
            return None
        size = (self.network.config.height, self.network.config.width)
        if self.condition == "semantic":
            return inpaint.semantic_condition(batch["map"], 2, size)
        images = batch["images"]
        holes = inpaint.random_holes(key, *images.shape[:3])
        if self.autoencoder is None:
            return inpaint.inpainting_condition(lambda x: x, images, holes)
        config = self.autoencoder
        return inpaint.inpainting_condition(lambda x: vae.encode(config, frozen, x), images, holes)


def objective_of(name: str, *, drop_rate: float = 0.1, guidance: float = 1.0) -> Objective:
    """Flow matching, or MeanFlow at `WIDE_PAIRS` with guidance inside its targets. Raises `ConfigError` for another
    name, or guidance that would not be used or has no null."""
    if name == "flow" and guidance == 1.0:
        return FlowMatching(drop_rate=drop_rate)
    if name != "meanflow":
        raise ConfigError(f"objective {name!r} is none of flow, meanflow (which alone has guidance in its targets)")
    if guidance != 1.0 and not drop_rate:
        raise ConfigError("guidance in the targets needs a null condition: a drop rate above 0")
    within = None if guidance == 1.0 else TargetGuidance(guidance)
    return MeanFlow(times=WIDE_PAIRS, drop_rate=drop_rate, guidance=within)


def image_channels(condition: str, channels: int) -> int:
    """Channels that a condition puts beside x of `channels`. Raises `ConfigError` for an unknown condition."""
    if condition not in CONDITIONS:
        raise ConfigError(f"condition {condition!r} is none of {', '.join(CONDITIONS)}")
    return {"class": 0, "inpaint": channels + 1, "semantic": 2}[condition]


def label_map(images: np.ndarray) -> np.ndarray:
    """The two-class map i32[N,H,W] of images: 1 where the first channel is brighter than middle grey."""
    return (images[..., 0] > 0).astype(np.int32)


def flow_arrays(data: Images, condition: str, config: AutoencoderConfig | None, params: Any) -> dict[str, np.ndarray]:
    """What an update needs of each image: latents, or pixels, its label, and what its condition is made from."""
    arrays = {"labels": data.labels} if len(data.classes) > 1 else {}
    if config is None or condition == "inpaint":
        arrays["images"] = data.images
    if config is not None:
        arrays["mean"], arrays["log_variance"] = latents(config, params, data.images)
    if condition == "semantic":
        arrays["map"] = label_map(data.images)
    return arrays


def network_for(data: Images, config: AutoencoderConfig | None, condition: str = "class", **sizes: Any) -> Network:
    """A network for the set's images or their latents; `sizes` are `DitConfig`'s (hidden_size, num_layers, ...)."""
    height, width, channels = data.images.shape[1:] if config is None else config.latent_shape
    classes = len(data.classes) if len(data.classes) > 1 else 0
    beside = image_channels(condition, channels)
    return Network(DitConfig(height, width, channels, classes=classes, image_channels=beside, **sizes))


def flow_recipe(
    network: Network,
    data: Images,
    *,
    steps: int,
    objective: Objective | None = None,
    autoencoder: AutoencoderConfig | None = None,
    autoencoder_params: Any = None,
    condition: str = "class",
    batch: int = 128,
    rate: float = 1e-3,
    ema: float = 0.999,
    seed: int = 0,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    name: str = "flow",
    begin: Any = None,
) -> Recipe:
    """Trains `network.init(key)` by `objective` (default: flow matching). `name` and the rest are the run's identity;
    `begin`: the weights that a run begins with, where they are not random.

    Raises `InputError` where data and network differ in shape.
    """
    wanted = data.images.shape[1:] if autoencoder is None else autoencoder.latent_shape
    if network.shape != tuple(wanted):
        raise InputError(f"the network's x is {network.shape}, the data's {tuple(wanted)}")
    optimizer, planned = adam(rate, steps)
    identity = {
        "recipe": name, "seed": seed, "rate": rate, "batch": batch, "network": str(network.config), "ema": ema,
        "condition": condition, "images": fingerprint({"images": data.images, "labels": data.labels}),
        "begin": None if begin is None else fingerprint(begin),
        "autoencoder": None if autoencoder is None else fingerprint(autoencoder_params),
    }  # fmt: skip
    return Recipe(
        objective=FlowObjective(network, objective or FlowMatching(), autoencoder, condition),
        data=Epochs(flow_arrays(data, condition, autoencoder, autoencoder_params), batch, seed),
        optimizer=optimizer,
        schedule=planned,
        evaluate=evaluate,
        ema_decay=ema,
        tokens=lambda batch: len(next(iter(batch.values()))),
        frozen=autoencoder_params if condition == "inpaint" else None,
        identity=identity,
    )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a run shows on its way, in its folder: `samples.png`, a grid of samples by Heun, and `curve.png`, the loss
    so far. Without matplotlib nothing is drawn.

    Called as `Recipe.evaluate`; reports the share of pixels at the ends of their range, which rises when a flow
    diverges. A model with an image beside x is shown the first images of `data`, with their right half to paint.
    """

    model: FlowModel
    folder: Path
    data: Images
    rows: int = 36
    steps: int = 12

    def __call__(self, params: Any) -> dict[str, float]:
        model = dataclasses.replace(self.model, params=params)
        ts, key = schedule.uniform(self.steps), jax.random.key(0)
        every = max(1, len(self.data.images) // self.rows)
        images, labels = (x[::every][: self.rows] for x in (self.data.images, self.data.labels))
        if len(self.data.classes) == 1:
            labels = None
        elif model.condition == "class":
            labels = np.arange(len(images), dtype=np.int32) % len(self.data.classes)
        if model.condition == "inpaint":
            hole = np.zeros((*images.shape[:3], 1), bool)
            hole[:, :, images.shape[2] // 2 :] = True
            found = model.inpaint(key, images, hole, labels, ts)
        else:
            size = (model.network.config.height, model.network.config.width)
            semantic = model.condition == "semantic"
            image = inpaint.semantic_condition(jnp.asarray(label_map(images)), 2, size) if semantic else None
            found = model.sample(key, Condition(labels=labels, image=image), len(images), ts)
        found = np.asarray(found)
        try:
            picture.save_grid(self.folder / "samples.png", found)
        except ConfigError:  # no matplotlib
            return {"saturated": float((np.abs(found) >= 1.0).mean())}
        if (self.folder / "metrics.jsonl").is_file():
            record.draw_curve(self.folder / "metrics.jsonl", self.folder / "curve.png")
        return {"saturated": float((np.abs(found) >= 1.0).mean())}
