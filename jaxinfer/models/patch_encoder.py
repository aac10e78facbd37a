"""A small encoder of images into semantic tokens: patches, token- and channel-mixing layers, a label from their mean.

MLP-Mixer's layers (Tolstikhin et al. 2021, arXiv:2105.01601), which are dense, so fast on CPU. The tokens stand at the
places of a diffusion transformer's patches of the same size, to which they are compared in alignment.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer.errors import InputError
from jaxinfer.models.declare import Declared, layer_norm
from jaxinfer.models.dit import patchify


class PatchEncoder(Declared):
    """`x[B,H,W,C] -> (tokens [B,N,size], logits [B,classes])`. Raises InputError where `patch` does not divide x."""

    classes: int
    patch: int = 4
    size: int = 64
    num_layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if x.ndim != 4 or x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise InputError(f"x: got shape {x.shape}, accepts [B,H,W,C] whose H and W {self.patch} divides")
        h = self.affine("patches", patchify(x, self.patch), self.size, (None, "embed"))
        h = h + self.weight("positions", h.shape[1:], (None, "embed"))[None]
        for i in range(self.num_layers):
            mixed = self.affine(f"token_up_{i}", layer_norm(h).swapaxes(1, 2), 2 * h.shape[1], (None, None))
            mixed = self.affine(f"token_down_{i}", jax.nn.gelu(mixed), h.shape[1], (None, None))
            h = h + mixed.swapaxes(1, 2)
            up = self.affine(f"up_{i}", layer_norm(h), 4 * self.size, ("embed", "mlp"))
            h = h + self.affine(f"down_{i}", jax.nn.gelu(up), self.size, ("mlp", "embed"))
        tokens = layer_norm(h)
        return tokens, self.affine("labels", tokens.mean(1), self.classes, ("embed", None))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The encoder as a function, `(params, x[B,H,W,C]) -> (tokens, logits)`: hashable, static under `jax.jit`."""

    module: PatchEncoder

    def init(self, key: jax.Array, x: jax.Array) -> dict:
        """Random params for images like `x`."""
        return jax.jit(lambda key: nn.unbox(self.module.init(key, x)["params"]))(key)

    def __call__(self, params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens, logits = self.module.apply({"params": params}, x)
        return jnp.asarray(tokens), jnp.asarray(logits)
