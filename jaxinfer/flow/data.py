"""Small data that needs no download: letters drawn from bundled fonts, scikit-learn's digits, two-dimensional toys.

Glyphs are 36 classes (0-9, A-Z) of 32x32 pixels in the fonts that matplotlib ships; whole fonts are held out for test,
so that a distance to the test set measures more than memory. Images are float32[N,H,W,1] in [-1, 1], toys float32[N,2]
of about unit scale. The extras `plot` (matplotlib) and `flow` (scikit-learn) bring what they are made from.

Stability: internal.
"""

import functools
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.errors import ConfigError, InputError

CHARACTERS = string.digits + string.ascii_uppercase
TEST_FONTS = ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralItalic", "cmb10")
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Oblique"),
    *("DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "cmr10", "cmss10", "cmtt10"),
)
SIZES = (20, 23, 26)
SHIFTS = ((0, 0), (1, 1), (-1, 1), (1, -1))


class Images(NamedTuple):
    """images f32[N,H,W,1] in [-1, 1], labels i32[N] in 0..classes-1, and the name of each class."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def _need(module: str, package: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this data is made with {package}: pip install 'jaxinfer[{extra}]' or {package}") from error


def _draw(font: Any, character: str, size: int, shift: tuple[int, int]) -> np.ndarray:
    """The character in white on black, its box centred and then shifted, u8[size, size]."""
    image_module, draw_module = _need("PIL.Image", "pillow", "plot"), _need("PIL.ImageDraw", "pillow", "plot")
    image = image_module.new("L", (size, size), 0)
    draw = draw_module.Draw(image)
    left, top, right, bottom = font.getbbox(character)
    at = ((size - left - right) / 2 + shift[0], (size - top - bottom) / 2 + shift[1])
    draw.text(at, character, fill=255, font=font)
    return np.asarray(image)


@functools.cache
def glyphs(split: str = "train", *, fonts: tuple[str, ...] | None = None, size: int = 32) -> Images:
    """Every character in every font of the split, size and shift, in that order: 6,480 images to train on, 2,160 to
    test. Raises `ConfigError` without matplotlib, `InputError` for a split that is neither train nor test."""
    if split not in ("train", "test"):
        raise InputError(f"split {split!r} is neither 'train' nor 'test'")
    truetype = _need("PIL.ImageFont", "pillow", "plot").truetype
    folder = Path(_need("matplotlib", "matplotlib", "plot").get_data_path()) / "fonts" / "ttf"
    fonts = (TRAIN_FONTS if split == "train" else TEST_FONTS) if fonts is None else fonts
    images, labels = [], []
    for name in fonts:
        for points in SIZES:
            font = truetype(str(folder / f"{name}.ttf"), round(points * size / 32))
            for label, character in enumerate(CHARACTERS):
                for shift in SHIFTS:
                    images.append(_draw(font, character, size, shift))
                    labels.append(label)
    pixels = np.stack(images)[..., None].astype(np.float32) / 127.5 - 1.0
    return Images(pixels, np.asarray(labels, np.int32), tuple(CHARACTERS))


@functools.cache
def digits(split: str = "train") -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8; the last 360 of a fixed order are the test set."""
    if split not in ("train", "test"):
        raise InputError(f"split {split!r} is neither 'train' nor 'test'")
    found = _need("sklearn.datasets", "scikit-learn", "flow").load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    chosen = order[:-360] if split == "train" else order[-360:]
    images = found.images[chosen, :, :, None].astype(np.float32) / 8.0 - 1.0
    return Images(images, found.target[chosen].astype(np.int32), tuple(string.digits))


def from_file(path: str | Path) -> Images:
    """An npz file with `images` u8[N,H,W,C] or f[N,H,W,C] in [-1, 1], and `labels` int[N] or none (one class).

    Raises `InputError` naming what is wrong with it.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not an npz file of images: {error}") from None
    if "images" not in arrays or arrays["images"].ndim != 4 or not len(arrays["images"]):
        got = {name: value.shape for name, value in arrays.items()}
        raise InputError(f"{path}: needs images[N,H,W,C], has {got}")
    images = arrays["images"]
    images = images.astype(np.float32) / 127.5 - 1.0 if images.dtype == np.uint8 else images.astype(np.float32)
    if not np.isfinite(images).all() or abs(images).max() > 1.001:
        raise InputError(f"{path}: images are u8, or finite and in [-1, 1]; got a largest of {abs(images).max()}")
    labels = arrays.get("labels", np.zeros(len(images), np.int32))
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(f"{path}: labels are {len(images)} integers from 0, got {labels.dtype}{labels.shape}")
    return Images(images, labels.astype(np.int32), tuple(str(i) for i in range(int(labels.max()) + 1)))


SETS: dict[str, Callable[[str], Images]] = {"glyphs": glyphs, "digits": digits}


def load(name: str, split: str = "train") -> Images:
    """A set by its name, or an npz file's images (every tenth is for test)."""
    if name in SETS:
        return SETS[name](split)
    if not name.endswith(".npz"):
        raise ConfigError(f"data {name!r} is none of {', '.join(SETS)} and no .npz file")
    found = from_file(name)
    test = np.arange(len(found.images)) % 10 == 9
    keep = test if split == "test" and test.any() else ~test
    return Images(found.images[keep], found.labels[keep], found.classes)


def _eight_gaussians(rng: np.random.Generator, count: int) -> np.ndarray:
    angle = rng.integers(0, 8, count) * np.pi / 4
    return 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(count, 2))


def _moons(rng: np.random.Generator, count: int) -> np.ndarray:
    angle, lower = rng.uniform(0, np.pi, count), rng.integers(0, 2, count)
    x = np.where(lower, 1 - np.cos(angle), np.cos(angle)) - 0.5
    y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle)) - 0.25
    return 1.5 * np.stack([x, y], 1) + 0.05 * rng.normal(size=(count, 2))


def _checkerboard(rng: np.random.Generator, count: int) -> np.ndarray:
    column = rng.integers(0, 4, count)
    row = 2 * rng.integers(0, 2, count) + column % 2
    return np.stack([column, row], 1) + rng.uniform(size=(count, 2)) - 2.0


def _spirals(rng: np.random.Generator, count: int) -> np.ndarray:
    angle = 3 * np.pi * np.sqrt(rng.uniform(size=count))
    sign = 1 - 2 * rng.integers(0, 2, count)
    point = np.stack([np.cos(angle), np.sin(angle)], 1) * (angle * sign)[:, None] / (1.5 * np.pi)
    return point + 0.05 * rng.normal(size=(count, 2))


def _swiss_roll(rng: np.random.Generator, count: int) -> np.ndarray:
    angle = 1.5 * np.pi * (1 + 2 * rng.uniform(size=count))
    return np.stack([np.cos(angle), np.sin(angle)], 1) * angle[:, None] / 7 + 0.05 * rng.normal(size=(count, 2))


TOYS = {
    "eight_gaussians": _eight_gaussians,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
    "swiss_roll": _swiss_roll,
}


def toy(name: str, count: int, seed: Any = 0) -> np.ndarray:
    """`count` points f32[count, 2] of a toy. Raises `InputError` for a name that is not in TOYS."""
    if name not in TOYS:
        raise InputError(f"toy {name!r} is none of {', '.join(TOYS)}")
    return TOYS[name](np.random.default_rng(seed), count).astype(np.float32)
