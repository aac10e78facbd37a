"""A trained flow with its autoencoder: what is saved in a folder, sampled from, inverted and edited with.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import adaptive, flowopt, inversion
from jaxinfer.flow.adaptive import Tolerance
from jaxinfer.flow.guide import UNGUIDED, Guidance, guided
from jaxinfer.flow.inpaint import check_mask, inpainting_condition, paste
from jaxinfer.flow.meanflow import mean_velocity_of, solve_mean
from jaxinfer.flow.network import Network
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.solve import FixedStep, heun
from jaxinfer.flow.types import AnyArray, Condition
from jaxinfer.models import autoencoder as vae
from jaxinfer.models.autoencoder import AutoencoderConfig

CONDITIONS = ("class", "inpaint", "semantic")
VELOCITIES = ("instantaneous", "mean")


@dataclasses.dataclass(frozen=True)
class FlowModel:
    """A network and its params; `autoencoder` None: the flow is of pixels.

    classes: the names of the labels. condition: what the image beside x is, if anything (one of CONDITIONS).
    drop_rate: how often training dropped the condition; at 0 there is no null to guide away from.
    velocity: what was trained, one of VELOCITIES; a mean velocity (MeanFlow) is sampled in one step or a few.
    """

    network: Network
    params: Any
    autoencoder: AutoencoderConfig | None = None
    autoencoder_params: Any = None
    classes: tuple[str, ...] = ()
    condition: str = "class"
    drop_rate: float = 0.1
    velocity: str = "instantaneous"

    def __post_init__(self):
        if self.velocity not in VELOCITIES:
            raise ConfigError(f"velocity {self.velocity!r} is none of {', '.join(VELOCITIES)}")
        if self.condition not in CONDITIONS:
            raise ConfigError(f"condition {self.condition!r} is none of {', '.join(CONDITIONS)}")
        latent = self.network.shape if self.autoencoder is None else self.autoencoder.latent_shape
        if latent != self.network.shape:
            raise ConfigError(f"the autoencoder's latents are {latent}, the flow's {self.network.shape}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H,W,C] of an image."""
        a = self.autoencoder
        return self.network.shape if a is None else (a.height, a.width, a.channels)

    @property
    def default_solver(self) -> FixedStep:
        """Steps by the mean velocity where that was trained, and Heun's otherwise."""
        return solve_mean if self.velocity == "mean" else heun

    def encode(self, images: AnyArray) -> jax.Array:
        """Latents [B,h,w,c] of images [B,H,W,C], without noise."""
        if images.shape[1:] != self.image_shape:
            raise InputError(f"an image is {images.shape[1:]}, the model's are {self.image_shape}")
        return _encode(self.autoencoder, self.autoencoder_params, images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images [B,H,W,C] in [-1, 1] of latents [B,h,w,c]."""
        return _decode(self.autoencoder, self.autoencoder_params, latents)

    def labels(self, names: Any) -> np.ndarray:
        """Class names or numbers -> i32[N]. Raises `InputError` for one that the model does not have."""
        found = []
        for name in names:
            if str(name) in self.classes:
                found.append(self.classes.index(str(name)))
            elif str(name) == "none":
                found.append(-1)
            else:
                raise InputError(f"class {str(name)!r} is unknown: the model's are {', '.join(self.classes) or 'none'}")
        return np.asarray(found, np.int32)

    def check(self, cond: Condition, rows: int, guidance: Guidance) -> None:
        """Raises before work starts where the condition or the guidance does not fit the model."""
        self.network.check(cond, rows)
        if guidance.scale != 1.0 and (not self.drop_rate or cond.labels is None and cond.tokens is None):
            raise ConfigError(
                f"guidance of scale {guidance.scale:g} needs a null condition: this model was trained with drop_rate "
                f"{self.drop_rate:g} and has {len(self.classes)} classes"
            )

    def sample(
        self,
        key: jax.Array,
        cond: Condition,
        rows: int,
        ts: Any,
        *,
        solver: FixedStep | Tolerance | None = None,
        guidance: Guidance = UNGUIDED,
        first: int = 0,
    ) -> jax.Array:
        """Images [rows,H,W,C] under `cond` (which leads with rows) over the grid `ts`. Row i's noise is of
        fold_in(key, first + i), so that it does not depend on how many rows there are. The solver is `default_solver`
        unless given; a `Tolerance` is dopri5, which takes the grid's ends only (`InputError` where its steps run out).
        """
        solver = self.default_solver if solver is None else solver
        check_grid(ts)
        self.check(cond, rows, guidance)
        if solver is solve_mean and (self.velocity != "mean" or guidance.scale != 1.0):
            what = "a model trained on mean velocities" if self.velocity != "mean" else "guidance inside its training"
            raise ConfigError(f"steps by the mean velocity need {what}")
        x = source(key, rows, self.network.shape, first)
        if isinstance(solver, Tolerance):
            ends = (float(ts[0]), float(ts[-1]))
            found = _adaptive(self.network, self.params, cond, x, ends, solver, guidance)
            if not found.ok.all():
                raise InputError(f"{int((~found.ok).sum())} rows need more than {solver.max_steps} steps of dopri5")
            return self.decode(found.x)
        x = _sample(self.network, self.params, cond, x, jnp.asarray(ts, jnp.float32), solver, guidance)
        return self.decode(x)

    def edit(
        self,
        images: AnyArray,
        before: Condition,
        after: Condition,
        ts: Any,
        *,
        solver: FixedStep = heun,
        guidance: Guidance = UNGUIDED,
        start: float = 0.0,
        refine: int = 0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Images [B,H,W,C] of condition `before` made into `after`, by inversion to time `start`; only the way forward
        is guided. refine: iterations of FlowOpt, each of which brings the result nearer to the image that it came from
        and so gives up some of the edit; the nearest one is returned; `key` begins the search for its step. Raises
        `ConfigError` for refine without a key, and where a row has no step size that converges."""
        grid = inversion.from_time(ts, start)
        for cond in (before, after):
            self.check(cond, images.shape[0], guidance)
        if refine and key is None:
            raise ConfigError(f"refine {refine} needs a key, got none")
        y = self.encode(images)
        if not refine:
            x = _edit(self.network, self.params, before, after, y, grid, solver, guidance)
        else:
            x, bound = _refine(self.network, self.params, before, after, y, grid, solver, guidance, refine, key)
            flowopt.safe_step(bound)
        return self.decode(x)

    def inpaint(
        self,
        key: jax.Array,
        images: AnyArray,
        mask: AnyArray,
        labels: AnyArray | None,
        ts: Any,
        *,
        solver: FixedStep | None = None,
        guidance: Guidance = UNGUIDED,
    ) -> jax.Array:
        """Images [B,H,W,C] with their holes, mask bool[B,H,W,1], painted. Raises `ConfigError` for a model that was
        not trained to."""
        if self.condition != "inpaint":
            raise ConfigError("this model was not trained to inpaint; train one with --condition inpaint")
        check_mask(images, mask)
        cond = Condition(labels=labels, image=inpainting_condition(self.encode, images, mask))
        return paste(images, self.sample(key, cond, images.shape[0], ts, solver=solver, guidance=guidance), mask)


def source(key: jax.Array, rows: int, shape: tuple[int, ...], first: int = 0) -> jax.Array:
    """Standard normal f32[rows, *shape]; row i is of fold_in(key, first + i)."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(rows))
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, images):
    return images if config is None else vae.encode(config, params, images)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, latents):
    return jnp.clip(latents if config is None else vae.decode(config, params, latents), -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=("network", "solver", "guidance"))
def _sample(network, params, cond, x, ts, solver, guidance):
    if solver is solve_mean:
        velocity: Any = mean_velocity_of(network, params, cond)  # a `MeanVelocityFn`, which this solver alone takes
        return solve_mean(velocity, x, ts).x
    return solver(guided(network, params, cond, guidance), x, ts).x


@functools.partial(jax.jit, static_argnames=("network", "ends", "tolerance", "guidance"))
def _adaptive(network, params, cond, x, ends, tolerance, guidance):
    velocity_of = lambda cond: guided(network, params, cond, guidance)  # noqa: E731
    return adaptive.dopri5(velocity_of, x, cond, start=ends[0], end=ends[1], tolerance=tolerance)


@functools.partial(jax.jit, static_argnames=("network", "solver", "guidance"))
def _edit(network, params, before, after, x, ts, solver, guidance):
    forward, back = guided(network, params, after, guidance), guided(network, params, before, UNGUIDED)
    return inversion.edit(solver, back, forward, x, ts)


@functools.partial(jax.jit, static_argnames=("network", "solver", "guidance", "iterations"))
def _refine(network, params, before, after, y, ts, solver, guidance, iterations, key):
    forward, back = guided(network, params, after, guidance), guided(network, params, before, UNGUIDED)
    return flowopt.edit(back, lambda x: solver(forward, x, ts).x, y, ts, key, iterations=iterations)
