"""decode: a few queries against a long cache, every option and every way of keeping a cache, against the oracle."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.attention.decode import Codes, api, blocked, decode, numbers, quantize
from jaxinfer.pallas_kernels.attention.decode.arg_specs import SPECS
from jaxinfer.pallas_kernels.attention.decode.codes import pack, unpack
from jaxinfer.pallas_kernels.attention.decode.schedule import parts_of, stream_k
from tests import kernel_checks as checks

B, H, G, T, D, C = 3, 4, 2, 2, 16, 80
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625])
LENGTHS = jnp.array([80, 0, 33])
# One option of each kind at a time, and all of them together.
OPTIONS = {
    "plain": {},
    "all": {"window": 20, "softcap": 2.0, "alibi": SLOPES, "scale": 0.4},
    "transposed": {"transposed": True},
    "invariant": {"invariant": True, "window": 7},
    "unified": {"unified_max": 2.0},
}


def arrays(seed=0, dtype="float32", transposed=False):
    q, k, v = checks.normal(seed, (B, H, T, D), (B, G, C, D), (B, G, C, D), dtype=dtype)
    return q, jnp.swapaxes(k, 2, 3) if transposed else k, v


@functools.cache
def compiled(name: str, **more):
    options = OPTIONS[name] | more
    return jax.jit(lambda q, k, v, lengths: decode(q, k, v, lengths, **options))


@pytest.mark.parametrize("name", OPTIONS)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(lengths=st.lists(st.integers(0, C), min_size=B, max_size=B), seed=st.integers(0, 99))
def test_blocks_equal_reference(name, lengths, seed):
    """Whatever is live: empty rows, fewer tokens than queries, blocks that end with a row or inside it."""
    q, k, v = arrays(seed, transposed=OPTIONS[name].get("transposed", False))
    lengths = jnp.array(lengths, jnp.int32)
    got = compiled(name, block=32)(q, k, v, lengths)
    checks.assert_close(got, compiled(name, impl="ref")(q, k, v, lengths))


@pytest.mark.smoke
def test_at_once_and_in_blocks():
    """Without a block size the form chooses as the program runs; both ways give the reference's numbers."""
    q, k, v = checks.normal(1, (4, 2, 1, 64), (4, 1, 8192, 64), (4, 1, 8192, 64))
    f, ref = (jax.jit(functools.partial(decode, impl=impl)) for impl in (None, "ref"))
    for lengths in ([8192, 8000, 8192, 7000], [600, 8192, 0, 1]):
        lengths = jnp.array(lengths)
        checks.assert_close(f(q, k, v, lengths), ref(q, k, v, lengths))


def test_positions():
    """Queries after the cache see all of it; one at a negative position sees nothing."""
    q, k, v = arrays()
    after = LENGTHS[:, None] + jnp.arange(T)
    out, lse = decode(q, k, v, LENGTHS, positions=after, window=30)
    checks.assert_close((out, lse), decode(q, k, v, LENGTHS, positions=after, window=30, impl="ref"))
    whole = jax.nn.dot_product_attention(
        q[:1].swapaxes(1, 2), *(x[:1].swapaxes(1, 2) for x in (k, v))
    )  # every query of row 0 sees all 80 tokens
    checks.assert_close(decode(q, k, v, LENGTHS, positions=after)[0][:1], whole.swapaxes(1, 2))
    out, lse = decode(q, k, v, LENGTHS, positions=jnp.full((B, T), -1))
    assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("length", [0, 1, 79])
def test_reads_nothing_beyond_the_lengths(length):
    """NaN in dead slots of a cache that is read in blocks stays out of the result, but for the last live block."""
    q, k, v = arrays()
    lengths = jnp.full(B, length)
    dead = jnp.arange(C) >= -(-length // 16) * 16
    poisoned = (jnp.where(dead[:, None], jnp.nan, x) for x in (k, v))
    got = compiled("plain", block=16)(q, *poisoned, lengths)
    checks.assert_close(got, compiled("plain", impl="ref")(q, k, v, lengths))


def test_bfloat16():
    q, k, v = arrays(dtype="bfloat16")
    got = compiled("all", block=32)(q, k, v, LENGTHS)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    checks.assert_close(got, compiled("all", impl="ref")(q, k, v, LENGTHS), "bfloat16")


# Groups of tokens by channels: per token, per channel over 16 tokens (KIVI's keys), rectangles, one a head.
GROUPS = {"token": (1, None), "channel": (16, 1), "rectangle": (40, 4), "head": (80, None)}


@pytest.mark.parametrize(
    ("bits", "transposed", "group"),
    [(8, True, "channel"), (8, False, "head"), (4, False, "token"), (4, True, "rectangle")],
)
def test_codes(bits, transposed, group):
    """Codes give what their numbers give, in blocks that hold whole groups or lie within one."""
    q, k, v = arrays(2, transposed=transposed)
    tokens, channels = GROUPS[group]
    keys = quantize(k, bits=bits, tokens=tokens, channels=channels, transposed=transposed, symmetric=group == "head")
    values = quantize(v, bits=bits, tokens=tokens, channels=channels)
    block = {"rectangle": 20}.get(group, 16)
    got = jax.jit(functools.partial(decode, transposed=transposed, block=block))(q, keys, values, LENGTHS)
    want = decode(
        q, numbers(keys, -2 if transposed else -1), numbers(values), LENGTHS, transposed=transposed, impl="ref"
    )
    checks.assert_close(got, want)


def test_quantize():
    """Every number is within half a step of what its code stands for; symmetric codes keep zero."""
    _, k, _ = arrays(3)
    for bits, symmetric in ((8, False), (8, True), (4, False), (4, True)):
        codes = quantize(k, bits=bits, tokens=8, channels=4, symmetric=symmetric)
        step = jnp.repeat(jnp.repeat(codes.scale, 8, 2), 4, 3)
        assert (jnp.abs(numbers(codes) - k) <= 0.5001 * step).all()
        assert codes.values.nbytes == k.size * bits // 8
        assert (codes.offset is None) == symmetric
    every = jnp.arange(-8, 8, dtype=jnp.int8).reshape(1, 1, 1, 16)
    assert (jnp.concatenate(unpack(pack(every)), -1) == every).all()
    assert pack(every).ravel()[1] == (-7 & 15) | (1 << 4)  # channel 1 low, channel 9 high


def test_int8_cache_layout():
    """jaxinfer's int8 cache, groups on an axis of their own, is these codes by a reshape."""
    _, k, _ = arrays(4)
    grouped = jnp.swapaxes(k, 2, 3).reshape(B, G, D, C // 16, 16)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    scale = (high - low) / 255
    values = (jnp.round((grouped - low) / scale) - 128).astype(jnp.int8)
    codes = Codes(values.reshape(B, G, D, C), scale[..., 0], (low + 128 * scale)[..., 0])
    want = quantize(jnp.swapaxes(k, 2, 3), tokens=16, channels=1, transposed=True)
    assert (jnp.abs(codes.values.astype(int) - want.values) <= 1).all()
    checks.assert_close(numbers(codes, -2), numbers(want, -2), factor=500)  # one step where rounding differs


@pytest.mark.parametrize("name", ["all"])
def test_gradient(name):
    """The gradient in queries, keys, values and slopes is the reference's."""
    q, k, v = arrays(5)
    cotangents = checks.normal(6, (B, H, T, D), (B, H, T))
    options = {"alibi": SLOPES} | OPTIONS[name]
    slopes = options.pop("alibi")

    @functools.partial(jax.jit, static_argnames="impl")
    def pull(q, k, v, slopes, impl):
        def f(q, k, v, slopes):
            out, lse = decode(q, k, v, jnp.array([80, 2, 33]), alibi=slopes, impl=impl, **options)
            return jnp.vdot(out, cotangents[0]) + jnp.vdot(lse, cotangents[1])

        return jax.grad(f, (0, 1, 2, 3))(q, k, v, slopes)

    got = pull(q, k, v, slopes, None)
    want = jax.jit(
        jax.grad(
            lambda *x: sum(
                jnp.vdot(a, b)
                for a, b in zip(_reference(*x, jnp.array([80, 2, 33]), **options), cotangents, strict=True)
            ),
            (0, 1, 2, 3),
        )
    )(q, k, v, slopes)
    checks.assert_close(got, want)


def _reference(q, k, v, slopes, lengths, window=None, softcap=None, scale=D**-0.5):
    """Plain attention, differentiated by jax itself; every query sees a key."""
    k, v = (jnp.repeat(x, H // G, 1) for x in (k, v))
    score = jnp.einsum("bhtd,bhcd->bhtc", q, k) * scale
    score = score if softcap is None else softcap * jnp.tanh(score / softcap)
    distance = (lengths[:, None] - T + jnp.arange(T))[:, None, :, None] - jnp.arange(C)
    score -= slopes[:, None, None] * distance
    seen = (distance >= 0) & (distance < (window or C + 1))
    score = jnp.where(seen, score, -jnp.inf)
    return jnp.einsum("bhtc,bhcd->bhtd", jax.nn.softmax(score), v), jax.nn.logsumexp(score, -1)


def test_gradient_of_codes():
    """Gradients pass through codes to the queries and to the scales."""
    q, k, v = arrays(7)
    keys, values = quantize(k, bits=4, tokens=16, channels=1), quantize(v)

    def f(impl, q, scale):
        out, _ = decode(q, Codes(keys.values, scale, keys.offset, 4), values, LENGTHS, impl=impl)
        return (out**2).sum()

    got = jax.jit(jax.grad(functools.partial(f, None), (0, 1)))(q, keys.scale)
    step = 1e-2
    bump = jnp.zeros_like(keys.scale).at[0, 0, 1, 3].set(step)
    slope = (f("ref", q, keys.scale + bump) - f("ref", q, keys.scale - bump)) / (2 * step)
    assert abs(got[1][0, 0, 1, 3] - slope) < 2e-2 * abs(slope) + 1e-3
    bump = jnp.zeros_like(q).at[2, 3, 1, 5].set(step)
    slope = (f("ref", q + bump, keys.scale) - f("ref", q - bump, keys.scale)) / (2 * step)
    assert abs(got[0][2, 3, 1, 5] - slope) < 2e-2 * abs(slope) + 1e-3


@pytest.mark.parametrize("unified_max", [-200.0, 200.0])
def test_unified_maximum_falls_back(unified_max, monkeypatch):
    """A constant far from the scores would overflow or lose every term; the fallback keeps the result exact."""
    q, k, v = arrays(8)
    want = compiled("plain", impl="ref")(q, k, v, LENGTHS)
    checks.assert_close(decode(q, k, v, LENGTHS, unified_max=unified_max), want)
    monkeypatch.setattr(api, "in_range", lambda *_: jnp.array(True))
    with pytest.raises(AssertionError, match="relative errors"):
        checks.assert_close(decode(q, k, v, LENGTHS, unified_max=unified_max), want)


def test_invariant_rows():
    """A row's bits are the same alone in a batch of short rows and among long ones; the split usually changes them."""
    q, k, v = arrays(9)
    lengths = [jnp.array([77, a, b]) for a, b in ((0, 0), (80, 80), (3, 41))]
    kept = [compiled("invariant", block=16)(q, k, v, n)[0][0] for n in lengths]
    assert all((x == kept[0]).all() for x in kept)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(counts=st.lists(st.integers(0, 9), min_size=4, max_size=4), begin=st.integers(0, 3))
def test_stream_k(counts, begin):
    """Every block once, equal runs, parts where the schedule says, no slot twice."""
    workers, longest = 3, 12
    plan = jax.tree.map(np.asarray, _plan(jnp.full(4, begin), jnp.array(counts) + begin))
    units = [
        (i, b, w)
        for w in range(workers)
        for i, b, live in zip(plan.item[:, w], plan.block[:, w], plan.live[:, w], strict=True)
        if live
    ]
    assert sorted((i, b) for i, b, _ in units) == [(i, begin + b) for i, n in enumerate(counts) for b in range(n)]
    assert plan.steps == -(-sum(counts) // workers) and plan.live[plan.steps :].sum() == 0
    held = {(i, w) for i, _, w in units}
    slots, there = parts_of(plan, workers)
    assert held == {(i, w) for i in range(4) for w in range(workers) if there[i, w]}
    assert len({i + w for i, w in held}) == len(held)
    assert longest * 4 <= plan.item.shape[0] * workers


_plan = jax.jit(functools.partial(stream_k, workers=3, longest=12))


def test_planted_bug(monkeypatch):
    """Negative control: a merge that forgets the parts of an item's later workers is caught."""
    q, k, v = arrays(10)
    want = decode(q, k, v, LENGTHS, impl="ref")
    checks.assert_close(decode(q, k, v, LENGTHS, block=16), want)

    def forgetful(*args, **kwargs):
        plan = stream_k(*args, **kwargs)
        return plan._replace(last=jnp.minimum(plan.last, plan.first))

    monkeypatch.setattr(blocked, "stream_k", forgetful)
    with pytest.raises(AssertionError, match="relative errors"):
        checks.assert_close(decode(q, k, v, LENGTHS, block=16), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((3, 4, 16))}, r"q: got \[3, 4, 16\]"),
        ({"q": jnp.zeros((3, 3, 2, 16))}, "q: got 3 heads, accepts a multiple of the cache's 2"),
        ({"k": jnp.zeros((3, 2, 80, 8))}, "k: got"),
        ({"v": jnp.zeros((3, 2, 80, 16), jnp.bfloat16)}, "v: got bfloat16, accepts the dtype of k"),
        ({"k": jnp.zeros((3, 2, 80, 16), jnp.int8)}, "k: got int8"),
        ({"lengths": jnp.array([1, 2])}, "lengths: got"),
        ({"lengths": jnp.array([1, 81, 2])}, r"lengths\[1\]: got 81, accepts 0 to 80"),
        ({"lengths": jnp.array([1.0, 2.0, 3.0])}, "lengths: got float32, accepts integers"),
        ({"positions": jnp.zeros((3, 1), jnp.int32)}, "positions: got"),
        ({"window": 0}, "window: got 0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"alibi": jnp.zeros(2)}, "alibi: got"),
        ({"block": 0}, "block: got 0"),
        ({"impl": "triton"}, "impl: got 'triton'"),
        ({"k": Codes(jnp.zeros((3, 2, 80, 16), jnp.int8), jnp.ones((3, 2, 3, 1)))}, r"k.scale: got \[3, 2, 3, 1\]"),
        ({"k": Codes(jnp.zeros((3, 2, 80, 16), jnp.int8), jnp.ones((3, 2, 80, 1)), bits=4)}, "k: got"),
        ({"k": Codes(jnp.zeros((3, 2, 80, 16), jnp.int8), jnp.ones((3, 2, 80, 1)), bits=2)}, "k.bits: got 2"),
        (
            {"k": Codes(jnp.zeros((3, 2, 80, 16), jnp.int8), jnp.ones((3, 2, 5, 1))), "block": 24},
            "block: got 24, accepts blocks that fit the codes: keys have groups of 16",
        ),
    ],
)
def test_bad_input(change, message):
    q, k, v = arrays()
    arguments = {"q": q, "k": k, "v": v, "lengths": LENGTHS} | change
    with pytest.raises(ArgumentError, match=message):
        decode(**arguments)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["plain", "all", "transposed", "unified"])
def test_tpu_interpreted(name):
    q, k, v = arrays(11, transposed=name == "transposed")
    got = compiled(name, impl="tpu", interpret=True)(q, k, v, LENGTHS)
    checks.assert_close(got, compiled(name, impl="ref")(q, k, v, LENGTHS))


@pytest.mark.parametrize(("bits", "transposed", "tokens"), [(8, True, 16), (4, False, 128), (4, True, 1)])
def test_tpu_interpreted_codes(bits, transposed, tokens):
    """Several blocks; constants a channel over groups within a block and as long as one, and constants a token."""
    q, k, v = checks.normal(12, (2, 2, 1, 16), (2, 1, 384, 16), (2, 1, 384, 16))
    k = jnp.swapaxes(k, 2, 3) if transposed else k
    keys = quantize(k, bits=bits, tokens=tokens, channels=1 if tokens > 1 else None, transposed=transposed)
    values, lengths = quantize(v, bits=bits, symmetric=True), jnp.array([300, 128])
    options = {"transposed": transposed, "block": 128}
    got = decode(q, keys, values, lengths, impl="tpu", interpret=True, **options)
    checks.assert_close(got, decode(q, keys, values, lengths, impl="ref", **options))


def test_tpu_interpreted_gradient():
    q, k, v = arrays(13)

    def f(impl, q, k, v):
        return (decode(q, k, v, LENGTHS, impl=impl, interpret=impl == "tpu")[0] ** 2).sum()

    got, want = (jax.grad(functools.partial(f, impl), (0, 1, 2))(q, k, v) for impl in ("tpu", "blocked"))
    checks.assert_close(got, want)


def test_tpu_refuses():
    q, k, v = arrays()
    with pytest.raises(UnsupportedError, match="impl='tpu' cannot serve this call: blocks of 24 tokens"):
        decode(q, k, v, LENGTHS, impl="tpu", block=24)


@pytest.mark.parametrize("name", SPECS)
def test_lowers_for_tpu(name):
    spec = SPECS[name]
    f = functools.partial(decode, transposed=spec.transposed, **dict(spec.options))
    checks.assert_lowers(f, *spec.arguments(), platform="tpu")


@checks.needs_target("v5e")
@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("name", SPECS)
def test_compiles_for_tpu(name, target):
    spec = SPECS[name]
    f = functools.partial(decode, transposed=spec.transposed, **dict(spec.options))
    checks.assert_within_budget("decode", name, targets.compile_for(f, *spec.arguments(), target=target))


@checks.needs_mosaic_gpu
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (None, {"window": 20, "softcap": 2.0, "alibi": SLOPES, "scale": 0.3}),
        pytest.param(None, {"transposed": True, "unified_max": 3.0}, marks=pytest.mark.slow),
        pytest.param(8, {}, marks=pytest.mark.slow),
        pytest.param(8, {"transposed": True}, marks=pytest.mark.slow),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"transposed": True}, marks=pytest.mark.slow),
    ],
    ids=["options", "transposed", "int8", "int8 transposed", "int4", "int4 transposed"],
)
def test_gpu_interpreted(bits, options):
    """Three workers, whose runs end inside items; an empty row, a row that ends inside a block."""
    dim = 64 if bits is None else 128
    q, k, v = checks.normal(14, (3, 4, 2, dim), (3, 2, 192, dim), (3, 2, 192, dim), dtype="bfloat16")
    k = jnp.swapaxes(k, 2, 3) if "transposed" in options else k
    if bits is not None:
        k = quantize(k, bits=bits, tokens=64, channels=1, transposed="transposed" in options)
        v = quantize(v, bits=bits, symmetric=True)
    lengths = jnp.array([192, 0, 70])
    got = decode(q, k, v, lengths, impl="gpu", interpret=True, block=64, **options)
    checks.assert_close(got, decode(q, k, v, lengths, impl="ref", **options), "bfloat16")


@checks.needs_mosaic_gpu
def test_gpu_refuses():
    q, k, v = arrays()
    with pytest.raises(UnsupportedError, match="impl='gpu' cannot serve this call: queries are float32"):
        decode(q, k, v, LENGTHS, impl="gpu")


HOPPER = [name for name, spec in SPECS.items() if spec.dtype != "float32"]


@checks.needs_mosaic_gpu
@pytest.mark.parametrize("name", HOPPER)
def test_lowers_for_gpu(name):
    spec = SPECS[name]
    f = functools.partial(decode, transposed=spec.transposed, **dict(spec.options))
    checks.assert_lowers(f, *spec.arguments(), platform="cuda")


@checks.needs_target("h200")
@pytest.mark.parametrize("name", HOPPER)
def test_compiles_for_gpu(name):
    spec = SPECS[name]
    f = functools.partial(decode, transposed=spec.transposed, **dict(spec.options))
    checks.assert_within_budget("decode", name, targets.compile_for(f, *spec.arguments(), target="h200"))
