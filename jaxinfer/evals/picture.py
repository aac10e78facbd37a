"""Images as one picture: a grid of samples written as PNG, and read back. Needs matplotlib, of the extra `plot`.

Stability: internal.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import ConfigError, InputError


def _image() -> Any:
    try:
        from matplotlib import image
    except ImportError as error:
        raise ConfigError("PNG files need matplotlib: pip install 'jaxinfer[plot]'") from error
    return image


def grid(images: Any, columns: int = 0) -> np.ndarray:
    """images[N,H,W,C] in [-1, 1] side by side, in a square unless `columns` says, a line of grey between them:
    f32[rows (H+1) + 1, columns (W+1) + 1, C] in [0, 1]."""
    images = np.clip(np.asarray(images, np.float32) * 0.5 + 0.5, 0, 1)
    if images.ndim != 4 or not len(images):
        raise InputError(f"a grid is of images[N,H,W,C], got {images.shape}")
    n, h, w, c = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 0.5, np.float32)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        sheet[top : top + h, left : left + w] = image
    return sheet


def save_grid(path: str | Path, images: Any, *, columns: int = 0, zoom: int = 2) -> None:
    """Writes `grid(images)` as PNG, each pixel `zoom` pixels wide; 1 channel is grey, 3 are red, green and blue."""
    sheet = grid(images, columns)
    if sheet.shape[-1] not in (1, 3):
        raise InputError(f"a picture has 1 or 3 channels, got {sheet.shape[-1]}")
    sheet = np.repeat(sheet, 3 // sheet.shape[-1], -1).repeat(zoom, 0).repeat(zoom, 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _image().imsave(str(path), sheet)


def read(path: str | Path, channels: int) -> np.ndarray:
    """A PNG as f32[H,W,channels] in [-1, 1]."""
    try:
        found = np.asarray(_image().imread(str(path)), np.float32)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: not a PNG file: {error}") from None
    found = found[..., None] if found.ndim == 2 else found[..., :3]
    if channels == 1:
        found = found.mean(-1, keepdims=True)
    return np.repeat(found, channels // found.shape[-1] or 1, -1) * 2.0 - 1.0
