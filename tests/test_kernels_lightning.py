"""Lightning attention: tests/linear_checks.py with a constant decay a head."""

import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.linear import chunked
from jaxinfer.pallas_kernels.linear.lightning import lightning, lightning_step, ref
from tests import kernel_checks as checks
from tests.linear_checks import LENGTHS, H, LinearChecks, few_shapes, some_shape


class TestLightning(LinearChecks):
    name, GATE, ref = "lightning", "log_decay", ref
    op, step = staticmethod(lightning), staticmethod(lightning_step)

    @staticmethod
    def gate(x):
        return -jnp.resize(jnp.array([0.05, 0.0, 50.0]), x.shape[1])

    @staticmethod
    def at(gate, tokens):
        return gate

    @staticmethod
    def strong(gate):
        return jnp.full_like(gate, -50.0).at[0].set(-1e-3)

    @pytest.mark.slow
    @few_shapes
    @some_shape
    def test_blocked_on_shapes(self, case, ragged):
        self.assert_blocked_on(case, ragged)

    def test_planted_bug_is_caught(self, monkeypatch):
        """A chain that hands each chunk the state after it, not before it, fails the comparison."""
        chain = chunked._chain

        def late(state, over, added, reverse=False):
            after, met = chain(state, over, added, reverse)
            return after, jnp.concatenate([met[:, :, 1:], after[:, :, None]], 2)

        monkeypatch.setattr(chunked, "_chain", late)
        (q, k, v, log_decay, state), _ = self.inputs()
        got = lightning(q, k, v, log_decay, state=state, lengths=LENGTHS, scale=0.5, block=16)
        assert checks.error(got[0], self.expected()[0][0]) > 0.1

    @pytest.mark.parametrize(
        ("got", "message"),
        [
            ([0.0] * (H + 1), r"log_decay: got \[4\]"),
            ([0.1, 0.0, 0.0], "log_decay: got 0.1.*, accepts logarithms of decays, at most 0"),
        ],
    )
    def test_bad_decay(self, got, message):
        self.assert_refused({"log_decay": jnp.array(got)}, message)
