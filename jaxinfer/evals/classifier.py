"""A small classifier that is trained to measure with, and for nothing else; its inner layer is the space of distances.

Two hidden layers on pixels, trained with noise and small shifts so that its features are smooth, by a Python loop over
one jitted step. Distances are comparable only under the same classifier, so its digest goes beside every figure. Class
accuracy alone misleads (one-step samples that are class means score 1.0): `evaluate` gives it with the Fréchet
distance, precision, recall and the variance within classes.

Stability: experimental.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer.errors import InputError
from jaxinfer.evals.distances import frechet_distance, precision_recall

BATCH, CHUNK = 128, 1024


@dataclasses.dataclass(frozen=True)
class Classifier:
    """`features` f32[N, 64] and `logits` f32[N, classes] of images f32[N,H,W,C]; `digest` names these weights."""

    params: Any
    classes: int
    shape: tuple[int, ...]

    @property
    def digest(self) -> str:
        """A short hash of the weights."""
        leaves = jax.tree.leaves(jax.device_get(self.params))
        return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()[:12]

    def features(self, images: Any) -> np.ndarray:
        """What the last hidden layer makes of the images."""
        return self._run(images)[0]

    def logits(self, images: Any) -> np.ndarray:
        """Log-odds of the classes."""
        return self._run(images)[1]

    def _run(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(images, np.float32)
        if images.shape[1:] != self.shape:
            raise InputError(f"images are {images.shape[1:]}, the classifier's {self.shape}")
        parts = []
        for i in range(0, len(images), CHUNK):
            part = images[i : i + CHUNK]
            padded = np.concatenate([part, np.zeros((CHUNK - len(part), *self.shape), np.float32)])
            parts.append([np.asarray(x)[: len(part)] for x in _forward(self.params, padded)])
        hidden, logits = zip(*parts, strict=True)
        return np.concatenate(hidden), np.concatenate(logits)


@jax.jit
def _forward(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = images.reshape(images.shape[0], -1)
    for layer in params["hidden"]:
        h = jax.nn.silu(h @ layer["w"] + layer["b"][None])
    return h, h @ params["out"]["w"] + params["out"]["b"][None]


def _init(key: jax.Array, sizes: tuple[int, ...], classes: int) -> Any:
    def layer(key, i, o):
        return {"w": jax.random.normal(key, (i, o)) / i**0.5, "b": jnp.zeros(o)}

    keys = jax.random.split(key, len(sizes))
    hidden = [layer(k, i, o) for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=False)]
    return {"hidden": hidden, "out": layer(keys[-1], sizes[-1], classes)}


def _augment(key: jax.Array, images: jax.Array, noise: float, shift: int) -> jax.Array:
    noise_key, shift_key = jax.random.split(key)
    moves = jax.random.randint(shift_key, (images.shape[0], 2), -shift, shift + 1)
    moved = jax.vmap(lambda image, move: jnp.roll(image, move, (0, 1)))(images, moves)
    return moved + noise * jax.random.normal(noise_key, images.shape)


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    steps: int = 1500,
    seed: int = 0,
    noise: float = 0.3,
    shift: int = 0,
    rate: float = 1e-3,
) -> Classifier:
    """A classifier of images f32[N,H,W,C] and labels i32[N], features of 64 numbers; the same seed, the same weights.

    noise: standard deviation of what is added to pixels; shift: the most pixels an image is rolled by.
    """
    if len(images) != len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{len(images)} images need as many labels in 0..{classes - 1}, got {len(labels)}")
    key = jax.random.key(seed)
    width = int(np.prod(images.shape[1:]))
    params = _init(key, (width, 256, 64), classes)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, images, labels, key):
        def loss(params):
            _, logits = _forward(params, _augment(key, images, noise, shift))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for step in range(steps):
        rows = rng.integers(0, len(images), BATCH)
        params, state = update(params, state, images[rows], labels[rows], jax.random.fold_in(key, step))
    return Classifier(params, classes, tuple(images.shape[1:]))


def within_class_variance(features: np.ndarray, labels: np.ndarray) -> float:
    """The total variance of features [N, D] around their class's mean, averaged over samples."""
    labels = np.asarray(labels)
    centred = [features[labels == c] - features[labels == c].mean(0) for c in np.unique(labels)]
    return float(np.square(np.concatenate(centred)).sum(1).mean())


def evaluate(
    classifier: Classifier, real: np.ndarray, real_labels: np.ndarray, samples: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Samples f32[N,H,W,C], made for labels i32[N], against real images: Fréchet distance, precision and recall in the
    classifier's features, accuracy, and the variance within classes over the real set's."""
    truth, (found, logits) = classifier.features(real), classifier._run(samples)
    shares = precision_recall(truth, found)
    return {
        "frechet_distance": frechet_distance(truth, found),
        "precision": shares.precision,
        "recall": shares.recall,
        "accuracy": float((logits.argmax(1) == np.asarray(labels)).mean()),
        "variance_ratio": within_class_variance(found, labels) / within_class_variance(truth, real_labels),
    }
