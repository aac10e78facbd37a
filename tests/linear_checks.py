"""What holds for every linear attention op: each form is the recurrence, for every chunk, length, state and gate.

`LinearChecks` is inherited by the tests of an op, which say what `op`, `step`, `ref`, `gate` and `KEY` are.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from tests import kernel_checks as checks

B, H, T, K, V = 2, 3, 75, 16, 8
LENGTHS = jnp.array([T, 41])
# (B, H, T, K, V), tokens in a chunk: one token, one chunk longer than it, sizes that divide nothing, ones.
SHAPES = [((1, 1, 1, 3, 1), 8), ((2, 2, 33, 5, 7), 16), ((1, 3, 19, 8, 1), 7), ((3, 1, 24, 1, 4), 24)]
# Of a test of `assert_blocked_on`. Each class has its own: hypothesis refuses one that is inherited twice.
few_shapes = settings(max_examples=3, deadline=None, derandomize=True)
some_shape = given(case=st.sampled_from(SHAPES), ragged=st.booleans())
# What the kernels compile: sizes of heads, and few heads, whose sequences are cut in pieces.
H200 = ["4x8x8192x64", "4x8x8192x128", "1x8x32768x128"]


class LinearChecks:
    """`op` and `step`: the op's functions; `ref`: its module of that name; `GATE`: what its gates are called.

    `gate(x)`: gates from normal numbers [B, H, T, K]; `at(gate, tokens)`: those of some tokens.
    """

    name: str
    GATE: str

    @classmethod
    @functools.cache
    def inputs(cls, dtype="float32", sizes=(B, H, T, K, V)):
        b, h, t, k, v = sizes
        q, key, value, d_out = checks.normal(0, *((b, h, t, d) for d in (k, k, v, v)), dtype=dtype)
        state, d_state, x = checks.normal(1, (b, h, k, v), (b, h, k, v), (b, h, t, k))
        return (q, key, value, cls.gate(x), state), (d_out, d_state)

    @classmethod
    def both(cls, primals, cotangents, impl, block=None, interpret=False, lengths=LENGTHS):
        """Outputs and gradients, with ragged lengths, an initial state and a scale."""
        return _both(cls.op, primals, cotangents, lengths, impl, block, interpret)

    @classmethod
    @functools.cache
    def expected(cls, dtype="float32"):
        return cls.both(*cls.inputs(dtype), "ref")

    @classmethod
    def production(cls, shape="4x8x8192x128"):
        """Forward and backward at that shape, and its arguments."""
        b, h, t, d = map(int, shape.split("x"))

        def run(impl, *primals):
            out, pull = jax.vjp(lambda *x: cls.op(*x, impl=impl), *primals)
            return out, pull(out)

        gate = jax.eval_shape(cls.gate, jax.ShapeDtypeStruct((b, h, t, d), jnp.float32))
        return run, (*checks.avals(*[(b, h, t, d)] * 3), gate)

    @pytest.mark.parametrize("block", [1, 48, pytest.param(None, marks=pytest.mark.smoke)])
    def test_blocked_is_the_recurrence(self, block):
        """Chunks of one token, and chunks that do not divide the length."""
        checks.assert_close(self.both(*self.inputs(), "blocked", block), self.expected())

    @classmethod
    def assert_blocked_on(cls, case, ragged):
        """One of SHAPES, in forward and gradients."""
        sizes, block = case
        primals, cotangents = cls.inputs(sizes=sizes)
        lengths = jnp.arange(sizes[0]) * sizes[2] // 2 if ragged else jnp.full(sizes[0], sizes[2])
        got = cls.both(primals, cotangents, "blocked", block, lengths=lengths)
        checks.assert_close(got, cls.both(primals, cotangents, "ref", lengths=lengths))

    def test_blocked_in_bfloat16(self):
        checks.assert_close(self.both(*self.inputs("bfloat16"), "blocked"), self.expected("bfloat16"), "bfloat16")

    def test_gates_that_would_overflow_a_quotient(self):
        """Sums of gates down to -3200 in a chunk: exp(-sum) is infinite, and decays are only multiplied."""
        (q, k, v, gate, state), cotangents = self.inputs()
        primals = (q, k, v, self.strong(gate), state)
        checks.assert_close(self.both(primals, cotangents, "blocked"), self.both(primals, cotangents, "ref"))

    def test_parallel_form_agrees(self):
        (q, k, v, gate, _), _ = self.inputs()
        want = jax.jit(functools.partial(self.ref.parallel, scale=0.5))(q, k, v, gate)
        checks.assert_close(jax.jit(functools.partial(self.op, scale=0.5))(q, k, v, gate)[0], want)

    def test_steps_and_pieces_agree(self):
        """A sequence in two calls, the state handed over, and token by token, is the sequence in one call."""
        (q, k, v, gate, state), _ = self.inputs()
        run, step = jax.jit(self.op), jax.jit(self.step)
        pieces = [tuple(x[:, :, part] for x in (q, k, v)) for part in (slice(0, 50), slice(50, None))]
        out, final = run(q, k, v, gate, state=state)
        first, middle = run(*pieces[0], self.at(gate, slice(0, 50)), state=state)
        second, last = run(*pieces[1], self.at(gate, slice(50, None)), state=middle)
        checks.assert_close((jnp.concatenate([first, second], 2), last), (out, final))
        for t in range(50, 53):
            got, middle = step(*(x[:, :, t] for x in (q, k, v)), self.at(gate, t), middle)
            checks.assert_close(got, out[:, :, t])

    def test_tokens_behind_the_length_do_not_matter(self):
        (q, k, v, gate, state), _ = self.inputs()
        run = jax.jit(functools.partial(self.op, state=state, lengths=LENGTHS))
        behind = (jnp.arange(T) >= LENGTHS[:, None])[:, None, :, None]
        got = run(*(jnp.where(behind, 1e9, x) for x in (q, k, v)), gate)
        checks.assert_close(got, run(q, k, v, gate))
        assert not got[0][1, :, 41:].any()

    def test_tpu_kernel_interpreted(self):
        checks.assert_close(self.both(*self.inputs(), "tpu", 48, True), self.expected())

    @checks.needs_mosaic_gpu
    @pytest.mark.slow
    @pytest.mark.parametrize("pieces", [1, 2])
    def test_gpu_kernels_interpreted(self, monkeypatch, pieces):
        """Forward and backward, the sequence whole and cut in two pieces."""
        from jaxinfer.pallas_kernels.linear import gpu

        monkeypatch.setattr(gpu, "pieces", lambda blocks, length: pieces)
        length = 60 + 40 * pieces  # of its own, since what is compiled is kept by shapes
        primals, cotangents = self.inputs("bfloat16", (1, 1, length, 64, 64))
        lengths = jnp.array([length - 5])
        got = self.both(primals, cotangents, "gpu", interpret=True, lengths=lengths)
        checks.assert_close(got, self.both(primals, cotangents, "ref", lengths=lengths), "bfloat16")

    @checks.needs_target("h200")
    @pytest.mark.parametrize("shape", H200)
    def test_gpu_kernels_compile(self, shape):
        run, arguments = self.production(shape)
        build = targets.compile_for(functools.partial(run, "gpu"), *arguments, target="h200")
        checks.assert_within_budget(self.name, f"{shape} bfloat16 forward+backward", build)

    @checks.needs_mosaic_gpu
    def test_gpu_kernels_lower(self):
        run, arguments = self.production()
        checks.assert_lowers(functools.partial(run, "gpu"), *arguments, platform="cuda", calls=6)

    @pytest.mark.smoke
    def test_dispatch_takes_the_kernel_of_the_platform(self):
        """Unnamed, the program for a TPU holds the kernels and that for a CPU does not."""
        run, arguments = self.production()
        checks.assert_lowers(functools.partial(run, None), *arguments, platform="tpu", calls=3)
        text = jax.jit(functools.partial(run, None)).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
        assert "custom_call" not in text

    @checks.needs_target("v5e")
    @pytest.mark.parametrize("target", ["v5e", "v6e"])
    def test_tpu_kernels_compile(self, target):
        run, arguments = self.production()
        build = targets.compile_for(functools.partial(run, "tpu"), *arguments, target=target)
        checks.assert_within_budget(self.name, "4x8x8192x128 bfloat16 forward+backward", build)

    def test_form_that_cannot_serve_says_why(self):
        (q, k, v, gate, _), _ = self.inputs("float16")
        with pytest.raises(UnsupportedError, match="impl='tpu' cannot serve this call: the TPU has no float16"):
            self.op(q, k, v, gate, impl="tpu")
        with pytest.raises(UnsupportedError, match="head sizes K and V of 64 or 128|Mosaic GPU kernels need jax"):
            self.op(q, k, v, gate, impl="gpu")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": ((B, H, T), "float32")}, r"q: got \[2, 3, 75\], accepts an array \[B, H, T, K\]"),
            ({"v": ((B, H, T + 1, V), "float32")}, r"v: got \[2, 3, 76, 8\].*T = 75"),
            ({"k": ((B, H, T, K), "bfloat16")}, "k: got bfloat16, accepts the dtype of q, float32"),
            ({"state": ((B, H, K, V), "bfloat16")}, "state: got bfloat16, accepts float32"),
            ({"lengths": [T, T + 1]}, r"lengths\[1\]: got 76, accepts 0 to 75"),
            ({"lengths": [1.0, 2.0]}, "lengths: got float32, accepts integers"),
            ({"scale": float("nan")}, "scale: got nan, accepts a finite number"),
            ({"block": 0}, "block: got 0, accepts an integer of at least 1"),
            ({"impl": "fast"}, "impl: got 'fast', accepts"),
        ],
    )
    def test_bad_input(self, change, message):
        (name, value), *_ = change.items()
        made = jnp.zeros(*value) if isinstance(value, tuple) else jnp.array(value) if name == "lengths" else value
        self.assert_refused({name: made}, message)

    def assert_refused(self, change, message):
        (q, k, v, gate, _), _ = self.inputs()
        with pytest.raises(ArgumentError, match=message):
            self.op(**{"q": q, "k": k, "v": v, self.GATE: gate} | change)


@functools.partial(jax.jit, static_argnames=("op", "impl", "block", "interpret"))
def _both(op, primals, cotangents, lengths, impl, block, interpret):
    def run(q, k, v, gate, state):
        options = {"impl": impl, "block": block, "interpret": interpret, "scale": 0.5}
        return op(q, k, v, gate, state=state, lengths=lengths, **options)

    out, pull = jax.vjp(run, *primals)
    return out, pull(cotangents)
