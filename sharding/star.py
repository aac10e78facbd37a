"""All-reduce through one device: the others push their parts to it, it adds them and sends the sum back.

Li et al. 2025, "TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Mobile Devices" (arXiv:2410.00531): where
messages are small and links slow to answer, an all-reduce takes as long as its longest chain of hops, and the star's
chain is the shortest: there and back. `seconds` is the model of that for a star, a tree and a ring, `fastest` the
choice that follows from it, and `star_wins_below` the message size up to which the star beats a ring.

Guarantee: exact, up to the order of the sum, which is that of the devices; every device gets the same bits.
State: none. No defaults in the paper: its 8 devices are 4 hops from each other, so that a star takes 8 hops, a tree of
two levels 16, a ring 56. Departures: the paper leaves out the bytes, of which the star's first device moves all; here
they count. Between the devices of one machine, and over any fast interconnect, `jax.lax.psum` is the better choice.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError


def star_all_reduce(x: jax.Array, axis: str) -> jax.Array:
    """The sum of `x` over the mesh axis `axis`, on every device; call it inside `jax.shard_map`. Differentiable."""
    others = range(1, jax.lax.axis_size(axis))
    first = jax.lax.axis_index(axis) == 0
    total = x
    for i in others:  # what nobody sends arrives as zeros, so that the sum is right on the first device alone
        total = total + jax.lax.ppermute(x, axis, [(i, 0)])
    total = jnp.where(first, total, jnp.zeros_like(total))
    result = total
    for i in others:
        result = result + jax.lax.ppermute(total, axis, [(0, i)])
    return result


@dataclasses.dataclass(frozen=True)
class Links:
    """How devices are joined: `hop` seconds that a hop takes to answer, `hops` between two devices, `bandwidth` bytes a
    second of a device's link. Raises ConfigError for what is not positive (`hop` may be 0)."""

    hop: float
    hops: int
    bandwidth: float

    def __post_init__(self):
        if self.hop < 0 or self.hops < 1 or self.bandwidth <= 0:
            raise ConfigError(f"links: got {self}, accepts hop 0 or more, hops 1 or more, bandwidth above 0")


KINDS = ("star", "tree", "ring")


def seconds(kind: str, devices: int, nbytes: float, links: Links, *, fanout: int = 2) -> float:
    """Predicted time of one all-reduce of `nbytes` over `devices`; a tree's parents have `fanout` children.

    star: there and back, the first device's link moving `devices - 1` messages each way. tree: the same on each of its
    levels, with `fanout` messages. ring: `2 (devices - 1)` steps one after another, of `nbytes / devices` each.
    Raises ConfigError for an unknown kind or fewer than one device.
    """
    if kind not in KINDS or devices < 1 or fanout < 1:
        raise ConfigError(
            f"all-reduce {kind!r} of {devices} devices, fanout {fanout}; accepts {', '.join(KINDS)}, 1 or more each"
        )
    if devices == 1:
        return 0.0
    answer, transfer = links.hop * links.hops, nbytes / links.bandwidth
    if kind == "star":
        return 2 * (answer + (devices - 1) * transfer)
    if kind == "tree":
        return 2 * depth(devices, fanout) * (answer + fanout * transfer)
    return 2 * (devices - 1) * (answer + transfer / devices)


def depth(devices: int, fanout: int) -> int:
    """Levels below the root of the shallowest tree of `devices`."""
    levels, held = 0, 1
    while held < devices:
        levels += 1
        held += fanout**levels
    return levels


def fastest(devices: int, nbytes: float, links: Links, *, fanout: int = 2) -> str:
    """The kind of the least predicted time; of equals the first of star, tree, ring."""
    return min(KINDS, key=lambda kind: seconds(kind, devices, nbytes, links, fanout=fanout))


def star_wins_below(devices: int, links: Links) -> float:
    """Bytes of a message below which a star beats a ring: `n (n - 2) / (n - 1)^2` times what a link moves while
    two devices answer each other. 0 for two devices, whose ring takes as many steps and moves half the bytes."""
    share = devices * (devices - 2) / (devices - 1) ** 2 if devices > 1 else 0.0
    return share * links.hop * links.hops * links.bandwidth
