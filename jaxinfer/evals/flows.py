"""What a flow's sampling is like: how straight its trajectories are, and how often it evaluates its model.

Straightness is that of Liu, Gong, Liu 2022 (arXiv:2209.03003), divided by the squared length: 0 is a straight line.

Stability: experimental.
"""

from typing import Any

import numpy as np

from jaxinfer.errors import InputError


def straightness(trajectory: Any, ts: Any) -> float:
    """Mean over samples of sum_k dt_k |x_K - x_0 - (x_k+1 - x_k) / dt_k|^2 / |x_K - x_0|^2, from trajectory
    [K+1, B, ...] at times ts[K+1] that span [0, 1]."""
    x, ts = np.asarray(trajectory, np.float64), np.asarray(ts, np.float64)
    if len(x) != len(ts) or len(ts) < 2:
        raise InputError(f"a trajectory of {len(x)} points needs as many times (two at least), got {len(ts)}")
    x = x.reshape(*x.shape[:2], -1)
    dt = np.diff(ts)[:, None, None]
    whole = x[-1] - x[0]
    bend = (dt[..., 0] * np.square(whole - np.diff(x, axis=0) / dt).sum(-1)).sum(0)
    length = np.maximum(np.square(whole).sum(-1), 1e-12)
    return float((bend / length).mean())


def evaluations(steps: int, per_step: int, *, guided: bool = False, share_guided: float = 1.0) -> float:
    """Model evaluations a sample: `steps` steps of a solver with `per_step`, and the null's in the guided share."""
    return steps * per_step * (1.0 + (share_guided if guided else 0.0))
