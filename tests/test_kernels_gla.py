"""Gated linear attention: tests/linear_checks.py with a gate a channel and token."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.linear.gla import blocked, gla, gla_step, ref
from tests import kernel_checks as checks
from tests.linear_checks import LENGTHS, B, H, K, LinearChecks, T, few_shapes, some_shape


class TestGla(LinearChecks):
    name, GATE, ref = "gla", "log_gate", ref
    op, step = staticmethod(gla), staticmethod(gla_step)

    @staticmethod
    def gate(x):
        # Most gates near 1, as the paper's layer starts, some strong, some that shut a channel within a chunk.
        return jnp.where(x > 1.5, -50.0, jnp.where(x > 1, -3.0 * x, jax.nn.log_sigmoid(x) / 16))

    @staticmethod
    def at(gate, tokens):
        return gate[:, :, tokens]

    @staticmethod
    def strong(gate):
        return jnp.full(gate.shape, -50.0).at[:, :, ::3].set(-1e-3).at[:, :, 40:50].set(-jnp.inf)

    @pytest.mark.slow
    @few_shapes
    @some_shape
    def test_blocked_on_shapes(self, case, ragged):
        self.assert_blocked_on(case, ragged)

    def test_planted_bug_is_caught(self, monkeypatch):
        """A suffix that includes its own token's gate fails the comparison."""
        levels = blocked.levels

        def off_by_one(gate, size):
            return ((h, prefix, suffix * gate) for h, prefix, suffix in levels(gate, size))

        monkeypatch.setattr(blocked, "levels", off_by_one)
        (q, k, v, log_gate, state), _ = self.inputs()
        got = gla(q, k, v, log_gate, state=state, lengths=LENGTHS, scale=0.5, block=16)
        assert checks.error(got[0], self.expected()[0][0]) > 0.01

    @pytest.mark.parametrize(
        ("got", "message"),
        [
            (jnp.zeros((B, H, T)), r"log_gate: got \[2, 3, 75\]"),
            (jnp.zeros((B, H, T, K), jnp.float16), "log_gate: got float16, accepts float32"),
            (jnp.full((B, H, T, K), 0.5), "log_gate: got 0.5, accepts logarithms of decays, at most 0"),
        ],
        ids=["rank", "dtype", "positive"],
    )
    def test_bad_gate(self, got, message):
        self.assert_refused({"log_gate": got}, message)
