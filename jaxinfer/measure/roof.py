"""What the machine can do, measured: bytes a second of a copy, operations a second of a product; the roofline share.

The roofline model is of Williams, Waterman and Patterson (2009): time is at least bytes / bandwidth and at least
operations / rate, and the share is that bound over the measured time.

Stability: experimental.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import InputError
from jaxinfer.measure.timing import interleaved

_COPY_BYTES = {"cpu": 2**28}  # far more than a cache holds
_MATMUL_SIZE = {"cpu": 1536}


def copy_bandwidth(nbytes: int | None = None, *, rounds: int = 9) -> float:
    """Bytes a second that the default device reads and writes, the best of the rounds.

    An array is updated in place (its buffer is donated), so each byte is read once and written once and no page is
    new: on a CPU a copy into other memory also fetches the lines it overwrites, and into fresh memory is dominated by
    page faults (eight times slower in a trial).
    """
    count = (nbytes or _COPY_BYTES.get(jax.default_backend(), 2**30)) // 4
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jnp.zeros(count, jnp.float32)]

    def step() -> jax.Array:
        held[0] = update(held[0])
        return held[0]

    return 2 * 4 * count / interleaved({"copy": step}, rounds=rounds)["copy"].min


def matmul_rate(dtype: Any = jnp.float32, *, size: int | None = None, rounds: int = 9) -> float:
    """Operations a second (two a multiply-add) of a square product of `dtype`, the best of the rounds.

    Operands are random, since products of zeros let some devices run at a higher clock. Integers accumulate in int32.
    Floats use the precision in force (`jax.default_matmul_precision`), so that the share of a program is taken
    against what its own products could reach.
    """
    n = size or _MATMUL_SIZE.get(jax.default_backend(), 8192)
    dtype = jnp.dtype(dtype)
    keys = jax.random.split(jax.random.key(0))
    if jnp.issubdtype(dtype, jnp.integer):
        a, b = (jax.random.randint(key, (n, n), -8, 8).astype(dtype) for key in keys)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.int32))
    else:
        a, b = (jax.random.normal(key, (n, n)).astype(dtype) for key in keys)
        product = jax.jit(jnp.matmul)
    return 2 * n**3 / interleaved({"matmul": lambda: product(a, b)}, rounds=rounds)["matmul"].min


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured bytes a second and operations a second of one device and dtype."""

    bandwidth: float
    flops: float

    @property
    def ridge(self) -> float:
        """Operations a byte at which a program stops being bound by memory."""
        return self.flops / self.bandwidth


def limits(dtype: Any = jnp.float32) -> Limits:
    """Measure both limits of the default device: about two seconds on a CPU."""
    return Limits(bandwidth=copy_bandwidth(), flops=matmul_rate(dtype))


@dataclasses.dataclass(frozen=True)
class Share:
    """`share` of the bound reached (1 is all of it), the bound in seconds, and what bounds: "memory" or "compute"."""

    share: float
    bound_s: float
    bound_by: str

    def __str__(self) -> str:
        return f"{self.share:.0%} of what {self.bound_by} allows"


def roofline(flops: float, nbytes: float, seconds: float, limits: Limits) -> Share:
    """The share of the machine's limits that a program reached that did `flops` and moved `nbytes` in `seconds`."""
    if not (flops >= 0 and nbytes >= 0 and flops + nbytes > 0 and seconds > 0):
        raise InputError(f"roofline: flops={flops}, nbytes={nbytes}, seconds={seconds} are not a measured program")
    memory, compute = nbytes / limits.bandwidth, flops / limits.flops
    bound = max(memory, compute)
    return Share(bound / seconds, bound, "memory" if memory >= compute else "compute")
