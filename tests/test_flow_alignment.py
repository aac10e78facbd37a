"""Embedded representation warm-up: which layers learn, what is taken over, and how the alignment fades."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import alignment
from jaxinfer.flow.alignment import Aligned, AlignedFlowMatching, EncoderObjective, Projection, Warmup
from jaxinfer.flow.network import Network
from jaxinfer.flow.objective import FlowMatching
from jaxinfer.flow.types import Batch, Condition, Out
from jaxinfer.models.dit import DitConfig
from jaxinfer.models.patch_encoder import Encoder, PatchEncoder

KEY = jax.random.key(0)
# Two classes of images, told apart by their upper rows.
LABELS = np.arange(32) % 2
NOISE = 0.3 * np.random.default_rng(0).normal(size=(32, 4, 4, 1))
IMAGES = jnp.asarray(NOISE + (2 * LABELS - 1)[:, None, None, None] * np.eye(4)[0][:, None, None], jnp.float32)
BATCH = Batch(IMAGES, Condition(labels=jnp.asarray(LABELS)))
TARGETS = jnp.asarray(np.random.default_rng(1).normal(size=(32, 4, 8)), jnp.float32)
PARAMS = {
    "network": jnp.asarray(0.7),
    "project": jnp.asarray(np.random.default_rng(2).normal(size=(4, 8)), jnp.float32),
}


def toy(params, x, t, s, cond, *, seg=None, features=None):
    """Four tokens of four numbers, the rows of the image."""
    tokens = params * x[..., 0] + t[:, None, None]
    return Out(tokens[..., None], {"taps": (tokens,)})


def project(params, h):
    return h @ params["project"]


@pytest.mark.smoke
def test_alignment_is_the_cosine_of_every_image():
    a = jnp.asarray([[[1.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]]])
    b = jnp.asarray([[[3.0, 0.0]], [[0.0, -1.0]], [[1.0, 0.0]]])
    np.testing.assert_allclose(alignment.alignment_losses(a, b), [-1, 1, -np.sqrt(0.5)], rtol=1e-6)
    with pytest.raises(InputError, match="the projected tokens have"):
        alignment.alignment_losses(a, b[..., :1])


def test_the_warm_up_reads_clean_images_and_every_one_of_them(monkeypatch):
    seen = []

    def spy(p, x, t, s, cond, **options):
        seen.append((x, t))
        return toy(p, x, t, s, cond, **options)

    loss = lambda targets: Warmup(project)(spy, PARAMS, KEY, Aligned(BATCH, targets))[0]  # noqa: E731
    rows = lambda: (jnp.abs(jax.grad(loss)(TARGETS)).sum((1, 2)) > 0).sum()  # noqa: E731
    assert rows() == 32
    np.testing.assert_array_equal(seen[0][0], IMAGES)
    assert (seen[0][1] == 1).all()  # t = 1 is the data
    # Negative control, the released code's slip: what the last image left is all that counts.
    right = alignment.alignment_losses
    monkeypatch.setattr(alignment, "alignment_losses", lambda a, b: right(a, b)[-1:])
    assert rows() == 1


@pytest.mark.slow
def test_without_weight_it_is_flow_matching():
    flow = FlowMatching(drop_rate=0.0)

    @jax.jit
    def both(weight):
        aligned = Aligned(BATCH, TARGETS, weight)
        return AlignedFlowMatching(project, flow)(toy, PARAMS, KEY, aligned), flow(toy, PARAMS["network"], KEY, BATCH)[
            0
        ]

    (none, metrics), plain = both(0.0)
    assert float(none) == pytest.approx(float(plain), rel=1e-6)
    assert float(both(2.0)[0][0] - none) == pytest.approx(2 * float(metrics["alignment"]), rel=1e-4)
    deaf = lambda *inputs, **options: Out(toy(*inputs, **options).v, {})  # noqa: E731
    with pytest.raises(InputError, match='aux\\["taps"\\] is empty'):
        AlignedFlowMatching(project)(deaf, PARAMS, KEY, Aligned(BATCH, TARGETS))


def test_the_weight_halves():
    weight = alignment.decaying(3.0, half_life=100)
    np.testing.assert_allclose([weight(s) for s in (0, 100, 200)], [3, 1.5, 0.75], rtol=1e-6)
    with pytest.raises(ConfigError, match="halving every 0"):
        alignment.decaying(1.0, half_life=0)


def test_graft_takes_what_was_warmed_up():
    whole = {"block_0": {"w": jnp.zeros((2, 2))}, "block_1": {"w": jnp.zeros((2, 2))}, "final": {"w": jnp.zeros(2)}}
    front = {"block_0": {"w": jnp.ones((2, 2))}, "final": {"w": jnp.ones(2)}}
    grafted = alignment.graft(whole, front)
    assert grafted["block_0"]["w"].all() and not grafted["block_1"]["w"].any() and not grafted["final"]["w"].any()
    with pytest.raises(InputError, match="the model has no block_9"):
        alignment.graft(whole, {"block_9": {}})
    with pytest.raises(InputError, match="block_0: shapes"):
        alignment.graft(whole, {"block_0": {"w": jnp.zeros(3)}})


def train(objective, params, batches, steps):
    """Adam on `(params, key, batch) -> (loss, metrics)`; the last metrics."""
    optimizer = optax.adam(5e-3)

    @jax.jit
    def update(params, state, key):
        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params, key, batches)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for i in range(steps):
        params, state, metrics = update(params, state, jax.random.fold_in(KEY, i))
    return params, metrics


@pytest.mark.slow
def test_an_encoder_and_layers_that_learn_from_it():
    """The encoder tells the classes apart; a model's first layer learns its tokens, and keeps them in the whole one."""
    encoder = Encoder(PatchEncoder(classes=2, patch=2, size=8, num_layers=1))
    learn = EncoderObjective(encoder)
    params, metrics = train(lambda p, k, b: learn(p, b, k), encoder.init(KEY, IMAGES), BATCH, 80)
    tokens, logits = encoder(params, IMAGES)
    assert tokens.shape == (32, 4, 8) and float((logits.argmax(-1) == LABELS).mean()) > 0.95
    assert float(metrics["accuracy"]) > 0.9
    with pytest.raises(InputError, match=r"got shape \(2, 5, 4, 1\)"):
        encoder(params, jnp.zeros((2, 5, 4, 1)))
    sizes = dict(patch=2, hidden_size=16, num_heads=2, classes=2)
    front = Network(DitConfig(4, 4, 1, num_layers=1, **sizes), taps=(0,))
    whole = Network(DitConfig(4, 4, 1, num_layers=2, **sizes), taps=(0,))
    head, aligned = Projection(16, 8), Aligned(BATCH, tokens)
    begun = {"network": front.init(KEY), "project": head.init(KEY, 16)}
    warm_up = lambda p, k, b: Warmup(head)(front, p, k, b)  # noqa: E731
    before = float(warm_up(begun, KEY, aligned)[1]["alignment"])
    warmed, metrics = train(warm_up, begun, aligned, 80)
    assert float(metrics["alignment"]) < before - 0.2
    grafted = alignment.graft(whole.init(jax.random.key(1)), warmed["network"])
    ones = jnp.ones(32)

    def loss_of(params):
        first = whole(params, IMAGES, ones, ones, BATCH.cond).aux["taps"][0]
        return float(alignment.alignment_losses(head(warmed, first), tokens).mean())

    found = loss_of(grafted)
    assert found == pytest.approx(float(metrics["alignment"]), abs=0.02)
    # Planted bug: a graft that leaves the warmed-up block behind.
    lost = alignment.graft(whole.init(jax.random.key(1)), warmed["network"], except_for=("final", "block_0"))
    assert loss_of(lost) > found + 0.1
