"""A variational autoencoder of patches: dense layers over channels and over patches, no convolution.

The latent space of latent flow matching (Dao et al. 2023, arXiv:2307.08698, who take a pretrained convolutional one of
Rombach et al. 2021, arXiv:2112.10752). Departure: the halves are MLP-mixers (Tolstikhin et al. 2021, arXiv:2105.01601)
on patches, since convolutions inside a compiled loop are some thirty times slower on CPU.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.declare import Declared, layer_norm
from jaxinfer.models.dit import patchify, unpatchify


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Images [H,W,C] to latents [H / patch, W / patch, latent_channels]; `scale` brings latents to variance 1."""

    height: int
    width: int
    channels: int
    patch: int = 4
    latent_channels: int = 4
    hidden_size: int = 128
    num_layers: int = 2
    mlp_ratio: int = 2
    scale: float = 1.0

    def __post_init__(self):
        sizes = (self.height, self.width, self.channels, self.patch, self.latent_channels, self.hidden_size)
        if min(sizes) < 1 or self.num_layers < 0:
            raise ConfigError(f"the sizes of an autoencoder are at least 1, got {self}")
        if self.height % self.patch or self.width % self.patch:
            raise ConfigError(f"patch {self.patch} does not divide the {self.height}x{self.width} image")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(f"scale must be above 0, got {self.scale}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of a latent."""
        return self.height // self.patch, self.width // self.patch, self.latent_channels


class Mixer(Declared):
    """Residual layers over patches and over channels of [B,N,D]."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, n = self.config, x.shape[1]
        across = jnp.swapaxes(layer_norm(x), 1, 2)
        across = jax.nn.gelu(self.affine("across_up", across, 2 * n, (None, None)))
        x = x + jnp.swapaxes(self.affine("across_down", across, n, (None, None), gain=0.0), 1, 2)
        h = jax.nn.gelu(self.affine("up", layer_norm(x), c.mlp_ratio * c.hidden_size, ("embed", "mlp")))
        return x + self.affine("down", h, c.hidden_size, ("mlp", "embed"), gain=0.0)


class Half(Declared):
    """Patches [B,N,I] -> [B,N,out_size]: the encoder or the decoder."""

    config: AutoencoderConfig
    out_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.affine("in", x, self.config.hidden_size, (None, "embed"))
        for i in range(self.config.num_layers):
            h = Mixer(self.config, name=f"mixer_{i}")(h)
        return self.affine("out", layer_norm(h), self.out_size, ("embed", None))


class Autoencoder(nn.Module):
    """`encode` and `decode`; what is called is both, for `init`."""

    config: AutoencoderConfig

    def setup(self):
        c = self.config
        self.encoder = Half(c, 2 * c.latent_channels)
        self.decoder = Half(c, c.patch**2 * c.channels)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B,H,W,C] -> mean and log-variance of their latents, [B,h,w,c] each, before `scale`."""
        c = self.config
        if images.shape[1:] != (c.height, c.width, c.channels):
            raise InputError(f"an image is {images.shape[1:]}, the autoencoder's are {(c.height, c.width, c.channels)}")
        h = self.encoder(patchify(images, c.patch)).reshape(-1, *c.latent_shape[:2], 2 * c.latent_channels)
        mean, log_variance = jnp.split(h, 2, -1)
        return mean, jnp.clip(log_variance, -20.0, 10.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B,h,w,c], before `scale` -> images [B,H,W,C]."""
        c = self.config
        if latents.shape[1:] != c.latent_shape:
            raise InputError(f"a latent is {latents.shape[1:]}, the autoencoder's are {c.latent_shape}")
        patches = self.decoder(latents.reshape(latents.shape[0], -1, c.latent_channels))
        return unpatchify(patches, c.patch, c.height, c.width)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images)[0])


def posterior(config: AutoencoderConfig, params, images: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the unscaled latents [B,h,w,c] of images [B,H,W,C]."""
    mean, log_variance = Autoencoder(config).apply({"params": params}, images, method="encode")
    return jnp.asarray(mean), jnp.asarray(log_variance)


def encode(
    config: AutoencoderConfig, params, images: jax.Array | np.ndarray, key: jax.Array | None = None
) -> jax.Array:
    """The scaled latents [B,h,w,c] of images [B,H,W,C]: the posterior's mean, or a draw of it with a key."""
    mean, log_variance = posterior(config, params, images)
    if key is not None:
        mean = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
    return mean * config.scale


def decode(config: AutoencoderConfig, params, latents: jax.Array) -> jax.Array:
    """Images [B,H,W,C] of scaled latents [B,h,w,c]."""
    return jnp.asarray(Autoencoder(config).apply({"params": params}, latents / config.scale, method="decode"))


def init(config: AutoencoderConfig, key: jax.Array):
    """Random params."""
    images = jnp.zeros((1, config.height, config.width, config.channels))
    return jax.jit(lambda key: nn.unbox(Autoencoder(config).init(key, images)["params"]))(key)
