"""The diffusion transformer and the autoencoder: shapes, conditions, per-token modulation, derivatives."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.network import Network
from jaxinfer.flow.types import Condition, null
from jaxinfer.models import autoencoder as vae
from jaxinfer.models.declare import Declared
from jaxinfer.models.dit import Block, DitConfig, patchify, time_features, unpatchify

CONFIG = DitConfig(
    4, 6, 3, hidden_size=32, num_layers=2, num_heads=2, classes=5, token_size=7, image_channels=1
)  # fmt: skip


@pytest.fixture(scope="module")
def network():
    return Network(CONFIG, taps=(0,))


@pytest.fixture(scope="module")
def params(network):
    """Weights that are nowhere zero: zero gates would hide what does not reach the output."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def run(network, params):
    compiled = jax.jit(network)
    return lambda *arguments: compiled(params, *arguments)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    cond = Condition(jnp.array([0, 4, 2]), draw(3, 2, 7), jnp.ones(3, bool), draw(3, 4, 6, 1))
    t = jnp.array([0.1, 0.5, 0.9])
    return draw(3, 4, 6, 3), t, t + 0.05, cond


def test_shapes_and_zero_start(network, inputs, run):
    out = run(*inputs)
    assert out.v.shape == (3, 4, 6, 3) and out.aux["taps"][0].shape == (3, 6, 32)
    fresh = network.init(jax.random.key(0))
    assert not jax.jit(network)(fresh, *inputs).v.any()


def test_every_input_is_heard(inputs, run):
    """Changing any part of the input of row 1 changes row 1 and no other row."""
    x, t, s, cond = inputs
    bump = lambda a: a.at[1].add(jnp.asarray(1, a.dtype) if a.dtype != bool else True)  # noqa: E731
    before = run(x, t, s, cond).v
    changed = {
        "x": (bump(x), t, s, cond),
        "t": (x, t.at[1].add(0.02), s, cond),
        "s": (x, t, s.at[1].add(0.2), cond),
        "labels": (x, t, s, dataclasses.replace(cond, labels=cond.labels.at[1].set(1))),
        "tokens": (x, t, s, dataclasses.replace(cond, tokens=bump(cond.tokens))),
        "keep": (x, t, s, dataclasses.replace(cond, keep=cond.keep.at[1].set(False))),
        "image": (x, t, s, dataclasses.replace(cond, image=bump(cond.image))),
    }
    for name, arguments in changed.items():
        difference = np.abs(np.asarray(run(*arguments).v - before)).max((1, 2, 3))
        assert difference[1] > 1e-3, name
        assert difference[0] == difference[2] == 0, name


def test_null_hides_class_and_tokens(inputs, run):
    x, t, s, cond = inputs
    other = dataclasses.replace(cond, labels=cond.labels[::-1], tokens=-cond.tokens)
    np.testing.assert_array_equal(run(x, t, s, null(cond)).v, run(x, t, s, null(other)).v)
    assert jnp.abs(run(x, t, s, null(cond)).v - run(x, t, s, cond).v).max() > 1e-3


def test_forward_derivative(network, params, inputs):
    """jvp in x, t and s agrees with a difference quotient: what MeanFlow trains on."""
    x, t, s, cond = inputs
    f = jax.jit(lambda e: network(params, x * (1 + e), t + 0.5 * e, s - 0.3 * e, cond).v)
    _, slope = jax.jvp(f, (jnp.float32(0.0),), (jnp.float32(1.0),))
    quotient = (f(jnp.float32(1e-2)) - f(jnp.float32(-1e-2))) / 2e-2
    np.testing.assert_allclose(slope, quotient, atol=2e-2 * float(jnp.abs(slope).max()))


@pytest.mark.slow
def test_a_condition_for_each_token():
    """Per-token modulation with the same condition everywhere is the per-row one; with others it is not."""
    config = DitConfig(4, 4, 1, hidden_size=16, num_layers=1, num_heads=2)
    block, rng = Block(config), np.random.default_rng(2)
    x, row = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 16), (2, 16)))
    shapes = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x, row)["params"])
    weights = {"params": jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), shapes)}
    everywhere = jnp.broadcast_to(row[:, None], (2, 4, 16))
    np.testing.assert_allclose(block.apply(weights, x, everywhere), block.apply(weights, x, row), atol=1e-5)
    assert jnp.abs(block.apply(weights, x, everywhere.at[:, 0].add(1.0)) - block.apply(weights, x, row)).max() > 0.01


def test_patches_and_times():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    np.testing.assert_array_equal(patches[0, 1].reshape(2, 2, 3), x[0, :2, 2:4])
    np.testing.assert_array_equal(unpatchify(patches, 2, 4, 6), x)
    slope = jax.jacfwd(lambda t: time_features(t[None], 10.0)[0])(jnp.float32(0.3))
    assert jnp.abs(slope).max() <= 10.0 + 1e-4  # what MeanFlow's target grows with


def test_quantized_weights(network, params, inputs, run):
    """int8 leaves go through the same module, near the unquantized output."""
    packed = quant.apply(params, [(r"block_.*/(qkv|o|up|down)", quant.Int8())])
    out = jax.jit(network)(packed, *inputs).v
    reference = run(*inputs).v
    assert 0 < jnp.abs(out - reference).max() < 0.1 * jnp.abs(reference).max()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA's CPU compiler does")
def test_gradients_of_weights_need_no_transposed_copies():
    class Affine(Declared):
        @nn.compact
        def __call__(self, x):
            return self.affine("w", jnp.sin(x), 24, (None, None))

    def loss(params, x):
        return jnp.sin(Affine().apply({"params": params}, x)).sum()

    x = jnp.ones((4, 16, 8))
    made = nn.unbox(Affine().init(jax.random.key(0), x)["params"])
    program = jax.jit(jax.grad(loss)).lower(made, x).compile().as_text()
    assert " dot(" in program
    assert " transpose(" not in program
    assert " copy(" not in program


def test_refusals(network, params, inputs):
    x, t, s, cond = inputs
    with pytest.raises(ConfigError, match="patch 3 does not divide the 4x6"):
        dataclasses.replace(CONFIG, patch=3)
    with pytest.raises(ConfigError, match="num_heads 3"):
        dataclasses.replace(CONFIG, num_heads=3)
    with pytest.raises(InputError, match="x is"):
        network(params, x[:, :, :4], t, s, cond)
    with pytest.raises(InputError, match="labels: got none, the model has 5"):
        network(params, x, t, s, dataclasses.replace(cond, labels=None))
    with pytest.raises(InputError, match="tokens: got none"):
        network(params, x, t, s, dataclasses.replace(cond, tokens=None))
    with pytest.raises(InputError, match="image condition is None"):
        network(params, x, t, s, dataclasses.replace(cond, image=None))
    with pytest.raises(InputError, match="class 5 is unknown: the model's are 0 to 4"):
        network.check(dataclasses.replace(cond, labels=jnp.array([0, 5, 1])), 3)
    with pytest.raises(InputError, match="labels has 3 rows, x has 2"):
        network.check(cond, 2)


@pytest.mark.slow
def test_autoencoder():
    config = vae.AutoencoderConfig(8, 8, 1, patch=2, latent_channels=2, hidden_size=16, num_layers=1, scale=0.5)
    params = vae.init(config, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    mean, log_variance = vae.posterior(config, params, images)
    assert mean.shape == log_variance.shape == (3, 4, 4, 2) == (3, *config.latent_shape)
    z = vae.encode(config, params, images)
    np.testing.assert_allclose(z, 0.5 * mean, rtol=1e-6)
    drawn = vae.encode(config, params, images, jax.random.key(2))
    np.testing.assert_allclose(jnp.std((drawn - z) / jnp.exp(0.5 * log_variance)), 0.5, atol=0.1)
    assert vae.decode(config, params, z).shape == (3, 8, 8, 1)
    with pytest.raises(InputError, match="an image is"):
        vae.encode(config, params, images[:, :4])
    with pytest.raises(InputError, match="a latent is"):
        vae.decode(config, params, z[:, :2])
    with pytest.raises(ConfigError, match="scale"):
        dataclasses.replace(config, scale=0.0)
