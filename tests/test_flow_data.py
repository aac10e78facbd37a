"""The data that is drawn here, and masks: fonts held out, fixed draws, files that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import data, inpaint


def test_glyphs():
    pytest.importorskip("matplotlib")
    fonts = data.TRAIN_FONTS[:2]
    found = data.glyphs(fonts=fonts)
    count = 2 * len(data.SIZES) * len(data.CHARACTERS) * len(data.SHIFTS)
    assert found.images.shape == (count, 32, 32, 1) and found.images.dtype == np.float32
    assert found.images.min() == -1 and found.images.max() == 1
    assert (np.bincount(found.labels) == count // 36).all() and found.classes[10] == "A"
    assert not set(data.TRAIN_FONTS) & set(data.TEST_FONTS)
    ink = (found.images > 0).mean((1, 2, 3))
    assert 0.01 < ink.min() and ink.max() < 0.6  # something is drawn, and it is no full square
    letters = found.images[: 36 * len(data.SHIFTS) : len(data.SHIFTS)]
    far = np.abs(letters[:, None] - letters[None]).sum((2, 3, 4)) + 1e9 * np.eye(36)
    assert far.min() > 5  # no two characters of a font look alike
    border = np.concatenate([found.images[:, [0, -1]].ravel(), found.images[:, :, [0, -1]].ravel()])
    assert (border == -1).mean() > 0.98  # letters are inside the picture
    with pytest.raises(InputError, match="neither 'train' nor 'test'"):
        data.glyphs("valid")


def test_digits():
    pytest.importorskip("sklearn")
    train, test = data.digits("train"), data.load("digits", "test")
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert train.images.min() == -1 and train.images.max() == 1 and set(train.labels) == set(range(10))


@pytest.mark.parametrize(("module", "name"), [("matplotlib", "glyphs"), ("sklearn.datasets", "digits")])
def test_missing_extras_are_named(module, name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    getattr(data, name).cache_clear()
    with pytest.raises(ConfigError, match=r"jaxinfer\["):
        data.load(name)


@pytest.mark.parametrize("name", data.TOYS)
def test_toys(name):
    points = data.toy(name, 500, 3)
    assert points.shape == (500, 2) and points.dtype == np.float32
    np.testing.assert_array_equal(points, data.toy(name, 500, 3))
    assert (points != data.toy(name, 500, 4)).any()
    assert 0.4 < points.std() < 2 and np.abs(points.mean(0)).max() < 0.5


def test_toys_known():
    radii = np.linalg.norm(data.toy("eight_gaussians", 400), axis=1)
    assert np.abs(radii - 2).max() < 0.6
    cells = np.floor(data.toy("checkerboard", 400)).astype(int).sum(1)
    assert (cells % 2 == 0).all()
    with pytest.raises(InputError, match="none of eight_gaussians"):
        data.toy("nine", 3)


def test_files(tmp_path):
    path, images = tmp_path / "a.npz", np.random.default_rng(0).integers(0, 255, (20, 4, 4, 1)).astype(np.uint8)
    np.savez(path, images=images, labels=np.arange(20) % 3)
    train, test = data.load(str(path)), data.load(str(path), "test")
    assert len(train.images) == 18 and len(test.images) == 2 and train.classes == ("0", "1", "2")
    np.testing.assert_allclose(test.images[0], images[9] / 127.5 - 1, atol=1e-6)
    for arrays, words in (
        ({"pictures": images}, "needs images"),
        ({"images": np.full((2, 4, 4, 1), np.nan)}, "finite"),
        ({"images": images, "labels": np.zeros(3, int)}, "labels are 20"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=words):
            data.load(str(path))
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="not an npz"):
        data.load(str(path))
    with pytest.raises(ConfigError, match="none of glyphs, digits"):
        data.load("letters")


def test_inpainting_condition():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32)
    hole = jnp.zeros((2, 4, 4, 1), bool).at[:, 0, 3].set(True)
    encode = lambda x: x.reshape(2, 2, 2, 2, 2).mean((2, 4))[..., None]  # 2x2 means as latents  # noqa: E731
    cond = inpaint.inpainting_condition(encode, images, hole)
    assert cond.shape == (2, 2, 2, 2)
    np.testing.assert_array_equal(cond[0, :, :, 1], [[-1, 1], [-1, -1]])  # one hidden pixel hides its latent
    hidden = images.at[:, 0, 3].set(77.0)
    np.testing.assert_array_equal(inpaint.inpainting_condition(encode, hidden, hole), cond)
    painted = inpaint.paste(images, jnp.full_like(images, 9.0), hole)
    assert (painted[:, 0, 3] == 9).all() and (jnp.where(hole, images, painted) == images).all()
    with pytest.raises(InputError, match="the mask is bool"):
        inpaint.paste(images, images, hole.astype(jnp.float32))


def test_semantic_condition():
    label_map = jnp.array([[[0, 1, 2, 2], [0, 0, 2, 2]]])
    cond = inpaint.semantic_condition(label_map, 3, (1, 2))
    np.testing.assert_allclose(cond[0, 0], [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(InputError, match="2x4 does not shrink to 1x3"):
        inpaint.semantic_condition(label_map, 3, (1, 3))


def test_random_holes():
    holes = np.asarray(jax.jit(inpaint.random_holes, static_argnums=(1, 2, 3))(jax.random.key(0), 200, 8, 12))[..., 0]
    share = holes.mean((1, 2))
    assert holes.shape == (200, 8, 12) and 0.03 < share.min() and share.max() < 0.7
    assert 60 < (share == 0.5).sum() < 160  # about half are halves
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    np.testing.assert_array_equal(rows * columns, holes.sum((1, 2)))  # each is a rectangle
