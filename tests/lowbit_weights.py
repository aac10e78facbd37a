"""Random low-bit weights with the dense weight they stand for, and the formats that tests of products go through."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.matmul import elements
from jaxinfer.pallas_kernels.matmul.weight import make

N, K = 48, 64


def random_weight(element, groups, *, zeros=False, n=N, k=K, scales="float32", rows=1, seed=0):
    """Random codes, scales and zeros of a format, and the dense weight written out in numpy."""
    random, kind = np.random.default_rng(seed), elements.ELEMENTS[element]
    fields = random.integers(0, 2**kind.bits, (n, k)).astype(np.uint8)
    table = elements.table(kind)
    fields[~np.isfinite(table[fields])] = 0
    stored = jnp.asarray(fields)
    if kind.bits == 8:
        stored = jax.lax.bitcast_convert_type(stored, jnp.dtype(kind.stored))
    s = random.uniform(0.5, 1.5, (n // rows, groups)).astype(np.float32)
    factor = None
    if scales == "uint8":
        stored_s, s = jnp.asarray(127 + np.round(s), jnp.uint8), 2.0 ** np.round(s)
    else:
        stored_s = jnp.asarray(s).astype(scales)
        s = np.float32(stored_s)
    if scales == "float8_e4m3fn":
        factor, s = jnp.full((1, 1), 0.25), s * 0.25
    z = random.integers(-3, 4, (n, groups)) if zeros else np.zeros((n, groups), int)
    dense = (table[fields].reshape(n, groups, -1) - z[..., None]) * np.repeat(s, rows, 0)[..., None]
    w = make(stored, stored_s, element, zeros=jnp.asarray(z, jnp.int8) if zeros else None, factor=factor)
    return w, dense.reshape(n, k).astype(np.float32)


FORMATS = {
    "int8": ("int8", 1, {}),
    "int8 groups": ("int8", 4, {"zeros": True}),
    "int4": ("int4", 1, {}),
    "int4 groups": ("int4", 4, {"zeros": True, "scales": "bfloat16"}),
    "int3": ("int3", 1, {"zeros": True}),
    "int3 groups": ("int3", 4, {}),
    "int2 groups": ("int2", 2, {"zeros": True}),
    "mxfp4": ("e2m1", 2, {"scales": "uint8"}),
    "nvfp4": ("e2m1", 4, {"scales": "float8_e4m3fn"}),
    "fp6": ("e3m2", 1, {"scales": "float16"}),
    "fp8 blocks": ("e4m3", 2, {"rows": 16}),
    "e5m2": ("e5m2", 1, {}),
}


def assert_no_dense_copy(op, element, groups):
    """Temporary memory of the compiled product of a 2048 x 2048 weight is far below the weight in floats."""
    n = k = 2048
    w, _ = random_weight(element, groups, n=8, k=k)
    spread = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0] * n // 8, a.shape[1]), a.dtype), w)
    x = jax.ShapeDtypeStruct((8, k), jnp.float32)
    memory = jax.jit(op).lower(x, spread).compile().memory_analysis()
    assert memory is not None
    temp = memory.temp_size_in_bytes
    assert temp < n * k * 4 / 2.5, f"{op.__name__} {element}: {temp} bytes"
