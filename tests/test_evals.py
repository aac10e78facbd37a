"""Metrics: closed forms, limits, and what each of them must not be fooled by."""

import jax
import numpy as np
import pytest

from jaxinfer.errors import InputError
from jaxinfer.evals import classifier, distances, flows, picture


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    mean, cov = np.array([1.0, -2.0]), np.array([[2.0, 0.3], [0.3, 0.5]])
    a = rng.multivariate_normal([0, 0], np.eye(2), 40_000)
    b = rng.multivariate_normal(mean, cov, 40_000)
    values = np.linalg.eigvalsh(cov)
    truth = mean @ mean + 2 + values.sum() - 2 * np.sqrt(values).sum()
    assert abs(distances.frechet_distance(a, b) - truth) < 0.1
    assert distances.frechet_distance(a, a) < 1e-8
    shuffled = rng.permuted(b, axis=0)  # the same marginals, without their correlation: a mean alone would not see it
    assert distances.frechet_distance(b, shuffled) > 0.01


def test_precision_and_recall_tell_apart():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(300, 3))
    same, narrow, wide = rng.normal(size=(300, 3)), 0.2 * rng.normal(size=(300, 3)), 5 * rng.normal(size=(300, 3))
    p, r = distances.precision_recall(real, same)
    assert p > 0.8 and r > 0.8
    p, r = distances.precision_recall(real, narrow)  # plausible, not diverse
    assert p > 0.95 and r < 0.5
    p, r = distances.precision_recall(real, wide)
    assert p < 0.3
    assert distances.precision_recall(real, real + 100) == (0.0, 0.0)


def test_wasserstein2():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(100, 2))
    assert distances.wasserstein2(points, points[::-1]) == 0
    np.testing.assert_allclose(distances.wasserstein2(points, points + [3.0, 4.0]), 5.0)
    line, moved = np.array([[0.0], [1.0], [5.0]]), np.array([[5.5], [0.0], [3.0]])
    np.testing.assert_allclose(distances.wasserstein2(line, moved), np.sqrt((0 + 4 + 0.25) / 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: distances.frechet_distance(np.zeros((1, 2)), np.zeros((3, 2))), "real: at least 2"),
        (lambda: distances.frechet_distance(np.zeros((3, 2)), np.zeros((3, 4))), "2 numbers a sample, samples have 4"),
        (lambda: distances.frechet_distance(np.zeros((3, 2)), np.full((3, 2), np.nan)), "3 samples are not finite"),
        (lambda: distances.wasserstein2(np.zeros((3, 2)), np.zeros((4, 2))), "3 and 4"),
        (lambda: distances.precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "at least 4"),
        (lambda: flows.straightness(np.zeros((3, 2, 2)), [0, 1]), "as many times"),
        (lambda: picture.grid(np.zeros((3, 2))), "images"),
    ],
    ids=["one", "width", "nan", "counts", "few", "times", "shape"],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_straightness_and_evaluations():
    ts = np.linspace(0, 1, 101)
    start, end = np.zeros((1, 4, 2)), np.random.default_rng(0).normal(size=(1, 4, 2))
    line = start + ts[:, None, None] * (end - start)
    assert flows.straightness(line, ts) < 1e-12
    slow = start + (ts**2)[:, None, None] * (end - start)  # straight, but not at constant speed: it is not free
    np.testing.assert_allclose(flows.straightness(slow, ts), 1 / 3, atol=0.01)  # the integral of (1 - 2t)^2
    assert flows.evaluations(8, 2, guided=True, share_guided=0.5) == 24


@pytest.fixture(scope="module")
def shapes():
    """Bars and blocks, two classes of 8x8 images."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    images = rng.normal(0, 0.2, (400, 8, 8, 1)).astype(np.float32) - 0.5
    for i, label in enumerate(labels):
        at = rng.integers(1, 5)
        images[i, at : at + 3, 1 : 1 + 3 + 3 * label] += 1.0
    return images, labels.astype(np.int32)


@pytest.fixture(scope="module")
def trained(shapes):
    return classifier.train_classifier(*shapes, 2, steps=150, seed=0)


@pytest.mark.slow
def test_classifier_measures(shapes, trained):
    images, labels = shapes
    half = np.arange(400) < 200
    scores = classifier.evaluate(trained, images[half], labels[half], images[~half], labels[~half])
    assert scores["accuracy"] > 0.95 and scores["recall"] > 0.7 and 0.8 < scores["variance_ratio"] < 1.25
    means = np.stack([images[labels == c].mean(0) for c in labels[~half]])  # what one-step samples look like
    fooled = classifier.evaluate(trained, images[half], labels[half], means, labels[~half])
    assert fooled["accuracy"] > 0.95  # accuracy alone does not see it
    assert fooled["frechet_distance"] > 3 * scores["frechet_distance"]
    assert fooled["recall"] < 0.3 and fooled["variance_ratio"] < 0.1
    swapped = classifier.evaluate(trained, images[half], labels[half], images[~half], 1 - labels[~half])
    assert swapped["accuracy"] < 0.05


def test_classifier_is_reproducible(shapes, trained):
    images, labels = shapes
    features = trained.features(images[:5])
    assert features.shape == (5, 64) and trained.logits(images[:5]).shape == (5, 2)
    np.testing.assert_allclose(trained.features(images[:2]), features[:2], atol=1e-5)
    other = jax.tree.map(lambda x: x + 1e-3, trained.params)
    assert len(trained.digest) == 12 and classifier.Classifier(other, 2, (8, 8, 1)).digest != trained.digest
    with pytest.raises(InputError, match="the classifier's"):
        trained.features(images[:, :4])
    with pytest.raises(InputError, match=r"labels in 0\.\.0"):
        classifier.train_classifier(images, labels, 1)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    images = np.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4, 1).astype(np.float32)
    sheet = picture.grid(images, columns=2)
    assert sheet.shape == (11, 11, 1) and sheet[1, 1, 0] == 0 and sheet[0, 0, 0] == 0.5
    picture.save_grid(tmp_path / "new" / "a.png", images, columns=3, zoom=1)
    back = picture.read(tmp_path / "new" / "a.png", 1)
    np.testing.assert_allclose(back[1:5, 1:5], images[0], atol=0.01)
    with pytest.raises(InputError, match="1 or 3 channels"):
        picture.save_grid(tmp_path / "b.png", np.zeros((1, 2, 2, 2)))
    (tmp_path / "c.png").write_bytes(b"no")
    with pytest.raises(InputError, match="not a PNG"):
        picture.read(tmp_path / "c.png", 1)
