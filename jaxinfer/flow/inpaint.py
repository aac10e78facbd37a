"""Inpainting and label maps: an image beside the noisy latent says what is there and where something is wanted.

Dao, Phung, Nguyen, Tran 2023 (arXiv:2307.08698): the condition's channels are concatenated to x_t. For inpainting they
are the latent of the image with its hole set to -1, and the hole as -1 and 1 at the latent's resolution; after
decoding, what was known is pasted back. For a label map they are its classes one by one, averaged down to the latent's
resolution. Approximate: the model decides what fits. State: none. Departures: the paper shrinks label maps through
a learned 1x1 convolution, which the patch layer that follows here contains; a mask shrinks by its largest value, not
the nearest, so that no latent that saw a hole counts as known.

Stability: experimental.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.errors import InputError
from jaxinfer.flow.types import AnyArray

HIDDEN = -1.0  # what a pixel in the hole is set to: the darkest value


def _blocks(x: AnyArray, size: tuple[int, int]) -> AnyArray:
    """x[B,H,W,C] as [B,h,H/h,w,W/w,C]. Raises `InputError` where h, w do not divide H, W."""
    b, height, width, c = x.shape
    h, w = size
    if height % h or width % w:
        raise InputError(f"{height}x{width} does not shrink to {h}x{w}: not a whole number of times")
    return x.reshape(b, h, height // h, w, width // w, c)


def check_mask(images: AnyArray, mask: AnyArray) -> None:
    """Raises `InputError` unless the mask bool[B,H,W,1] fits images[B,H,W,C]."""
    if mask.shape != (*images.shape[:3], 1) or mask.dtype != bool:
        raise InputError(f"the mask is bool{(*images.shape[:3], 1)} (True: to paint), got {mask.dtype}{mask.shape}")


def inpainting_condition(encode: Callable[[jax.Array], jax.Array], images: AnyArray, mask: AnyArray) -> jax.Array:
    """The condition f32[B,h,w,c+1] of images[B,H,W,C] with holes `mask` bool[B,H,W,1]: `encode` gives latents
    [B,h,w,c]. What is in the hole is not looked at."""
    check_mask(images, mask)
    known = encode(jnp.where(mask, HIDDEN, images))
    hole = _blocks(mask, (known.shape[1], known.shape[2])).max((2, 4))
    return jnp.concatenate([known, jnp.where(hole, 1.0, -1.0).astype(known.dtype)], -1)


def paste(images: AnyArray, painted: AnyArray, mask: AnyArray) -> jax.Array:
    """What was painted in the hole, and the image everywhere else."""
    check_mask(images, mask)
    return jnp.where(mask, painted, images)


def semantic_condition(label_map: jax.Array, classes: int, size: tuple[int, int]) -> jax.Array:
    """Label map i32[B,H,W] -> the share of each class in each of size = (h, w) cells, f32[B,h,w,classes]."""
    if label_map.ndim != 3:
        raise InputError(f"a label map is i32[B,H,W], got shape {label_map.shape}")
    return _blocks(jax.nn.one_hot(label_map, classes), size).mean((2, 4))


def random_holes(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """Holes to train on, bool[count,H,W,1]: a half (left, right, top, bottom), or a rectangle of a quarter to three
    quarters of each side."""
    keys = jax.random.split(key, 4)
    sides = jnp.stack([height * jnp.ones(count), width * jnp.ones(count)], 1)
    length = jnp.round(sides * jax.random.uniform(keys[0], (count, 2), minval=0.25, maxval=0.75))
    start = jnp.round(jax.random.uniform(keys[1], (count, 2)) * (sides - length))
    half = jax.random.randint(keys[2], (count,), 0, 4)
    middle = jnp.round(sides / 2)
    halves = jnp.stack([half // 2, half % 2], 1) == jnp.array([[0, 0]])  # rows or columns, first or second half
    by_rows, first = halves[:, 0], halves[:, 1]
    axis = jnp.stack([by_rows, ~by_rows], 1)
    half_start = jnp.where(axis & ~first[:, None], middle, 0.0)
    half_length = jnp.where(axis, middle, sides)
    whole = jax.random.bernoulli(keys[3], 0.5, (count, 1))
    start, length = jnp.where(whole, half_start, start), jnp.where(whole, half_length, length)

    def within(axis, size):
        place = jnp.arange(size)[None]
        return (place >= start[:, axis, None]) & (place < start[:, axis, None] + length[:, axis, None])

    return (within(0, height)[:, :, None] & within(1, width)[:, None, :])[..., None]
