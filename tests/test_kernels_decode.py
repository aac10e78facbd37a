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
from jaxinfer.pallas_kernels.attention.decode import Codes, api, blocked, decode, gpu, numbers, quantize
from jaxinfer.pallas_kernels.attention.decode.arg_specs import SPECS
from jaxinfer.pallas_kernels.attention.decode.codes import pack, unpack
from jaxinfer.pallas_kernels.attention.decode.items import units
from tests import kernel_checks as checks

B, H, G, T, D, C = 3, 4, 2, 2, 16, 80
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625])
LENGTHS = jnp.array([80, 0, 33])
OPTIONS = {
    "plain": {},
    "all": {"window": 20, "softcap": 2.0, "alibi": SLOPES, "scale": 0.4},
    "unified, transposed": {"unified_max": 2.0, "transposed": True},
    "invariant": {"invariant": True, "window": 7},
}
# Compiling dominates these tests and the arrays are tiny: LLVM's optimisations are left out.
quick_quantize = jax.jit(quantize, static_argnames=("bits", "tokens", "channels", "symmetric", "transposed"))


def arrays(seed=0, dtype="float32", transposed=False):
    q, k, v = checks.normal(seed, (B, H, T, D), (B, G, C, D), (B, G, C, D), dtype=dtype)
    return q, jnp.swapaxes(k, 2, 3) if transposed else k, v


@functools.cache
def compiled(name: str = "plain", **more):
    options = OPTIONS[name] | more
    return jax.jit(lambda q, k, v, lengths, positions=None: decode(q, k, v, lengths, positions=positions, **options))


@pytest.mark.parametrize("name", ["plain", "all", "unified, transposed"])
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(lengths=st.lists(st.integers(0, C), min_size=B, max_size=B), seed=st.integers(0, 99))
def test_blocks_equal_reference(name, lengths, seed):
    """Whatever is live: empty rows, fewer tokens than queries, blocks that end with a row or inside it."""
    q, k, v = arrays(seed, transposed="transposed" in name)
    lengths = jnp.array(lengths, jnp.int32)
    checks.assert_close(compiled(name, block=32)(q, k, v, lengths), compiled(name, impl="ref")(q, k, v, lengths))


# Groups of the codes of keys, in tokens by channels: a token, KIVI's channel over 8 tokens, a rectangle, a head.
GROUPS = {"token": (1, None), "channel": (8, 1), "rectangle": (16, 4), "head": (None, None)}


@st.composite
def calls(draw):
    """Sizes, ragged and degenerate ones among them, and how a cache of them is read and kept."""
    batch, groups, repeat, queries = (draw(st.sampled_from(sizes)) for sizes in ((1, 3), (1, 2), (1, 3), (1, 4)))
    capacity = draw(st.sampled_from([48, 50, 1]))
    kinds = ["token", "head"] if capacity % 16 else list(GROUPS)
    options = {"transposed": draw(st.booleans()), "block": draw(st.sampled_from([None, 16]))}
    lengths = draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    shapes = (batch, groups * repeat, queries, D), *[(batch, groups, capacity, D)] * 2
    return shapes, draw(st.sampled_from(kinds)), jnp.array(lengths, jnp.int32), options


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8", "int4"])
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(call=calls())
def test_any_shape_and_store(kept, call):
    """One row or token, one key head or several, any way to keep a cache: the reference's numbers of what is kept."""
    shapes, kind, lengths, options = call
    dtype = "bfloat16" if kept == "bfloat16" else "float32"
    rng = np.random.default_rng(0)  # numpy's, which compiles nothing for a new shape
    q, k, v = (rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes)
    k = np.swapaxes(k, 2, 3) if options["transposed"] else k
    if kept.startswith("int"):
        bits, capacity = int(kept[3:]), shapes[1][2]
        tokens, channels = GROUPS[kind]
        k = quick_quantize(
            k, bits=bits, tokens=tokens or capacity, channels=channels, transposed=options["transposed"],
            symmetric=kind == "head",
        )  # fmt: skip
        v = quick_quantize(v, bits=bits)
    got, want = (
        compiled(impl=impl, transposed=options["transposed"], block=block)(q, k, v, lengths)
        for impl, block in ((None, options["block"]), ("ref", None))
    )
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    checks.assert_close(got, want, dtype)


def test_at_once_and_in_blocks(monkeypatch):
    """The form chooses as the program runs, but for invariant rows; both ways give the reference's numbers."""
    monkeypatch.setattr(blocked, "SMALL", 0)
    monkeypatch.setattr(blocked, "BLOCK", 16)
    q, k, v = arrays(1)
    chosen = jax.jit(lambda *x: decode(*x)[0])
    kept = jax.jit(lambda *x: decode(*x, invariant=True)[0])
    first = {chosen: [], kept: []}
    for lengths in ([80, 80, 75], [80, 6, 0]):
        lengths = jnp.array(lengths)
        for f, rows in first.items():
            got = f(q, k, v, lengths)
            checks.assert_close(got, compiled(impl="ref")(q, k, v, lengths)[0])
            rows.append(got[0])
    assert (first[kept][0] == first[kept][1]).all()
    assert (first[chosen][0] != first[chosen][1]).any()  # negative control: this choice looks at the other rows


def test_positions():
    """Queries after the cache see all of it; one at a negative position sees nothing."""
    q, k, v = arrays()
    after = LENGTHS[:, None] + jnp.arange(T)
    out, lse = compiled("all", block=32)(q, k, v, LENGTHS, after)
    checks.assert_close((out, lse), compiled("all", impl="ref")(q, k, v, LENGTHS, after))
    whole = jax.jit(jax.nn.dot_product_attention)(
        q[:1].swapaxes(1, 2), *(x[:1].swapaxes(1, 2) for x in (k, v))
    )  # every query of row 0 sees all 80 tokens
    checks.assert_close(compiled(block=32)(q, k, v, LENGTHS, after)[0][:1], whole.swapaxes(1, 2))
    out, lse = compiled(block=32)(q, k, v, LENGTHS, jnp.full((B, T), -1))
    assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("length", [0, 1, 79])
def test_reads_nothing_beyond_the_lengths(length):
    """NaN in dead slots of a cache that is read in blocks stays out of the result, but for the last live block."""
    q, k, v = arrays()
    lengths = jnp.full(B, length)
    dead = jnp.arange(C) >= -(-length // 16) * 16
    poisoned = (jnp.where(dead[:, None], jnp.nan, x) for x in (k, v))
    got = compiled(block=16)(q, *poisoned, lengths)
    checks.assert_close(got, compiled(impl="ref")(q, k, v, lengths))


def test_quantize():
    """Every number is within half a step of what its code stands for; symmetric codes keep zero."""
    _, k, _ = arrays(3)
    for bits, symmetric in ((8, False), (8, True), (4, False), (4, True)):
        codes = quick_quantize(k, bits=bits, tokens=8, channels=4, symmetric=symmetric)
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
    want = quick_quantize(jnp.swapaxes(k, 2, 3), tokens=16, channels=1, transposed=True)
    assert (jnp.abs(codes.values.astype(int) - want.values) <= 1).all()
    checks.assert_close(numbers(codes, -2), numbers(want, -2), factor=500)  # one step where rounding differs


def test_gradient():
    """The gradient in queries, keys, values and slopes is the reference's."""
    q, k, v = arrays(5)
    cotangents = checks.normal(6, (B, H, T, D), (B, H, T))
    options = {name: x for name, x in OPTIONS["all"].items() if name != "alibi"}

    @jax.jit
    def pull(q, k, v, slopes):
        def f(q, k, v, slopes):
            out, lse = decode(q, k, v, jnp.array([80, 2, 33]), alibi=slopes, **options)
            return jnp.vdot(out, cotangents[0]) + jnp.vdot(lse, cotangents[1])

        return jax.grad(f, (0, 1, 2, 3))(q, k, v, slopes)

    got = pull(q, k, v, SLOPES)
    want = jax.jit(
        jax.grad(
            lambda *x: sum(
                jnp.vdot(a, b)
                for a, b in zip(_reference(*x, jnp.array([80, 2, 33]), **options), cotangents, strict=True)
            ),
            (0, 1, 2, 3),
        )
    )(q, k, v, SLOPES)
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
    keys, values = quick_quantize(k, bits=4, tokens=16, channels=1), quick_quantize(v)

    def f(impl, q, scale):
        out, _ = decode(q, Codes(keys.values, scale, keys.offset, 4), values, LENGTHS, impl=impl)
        return (out**2).sum()

    got = jax.jit(jax.grad(functools.partial(f, None), (0, 1)))(q, keys.scale)
    step, reference = 1e-2, jax.jit(functools.partial(f, "ref"))
    for x, at in ((1, (0, 0, 1, 3)), (0, (2, 3, 1, 5))):
        bump = [jnp.zeros_like(y).at[at].set(step) if i == x else 0.0 for i, y in enumerate((q, keys.scale))]
        up, down = (reference(q + sign * bump[0], keys.scale + sign * bump[1]) for sign in (1, -1))
        slope = (up - down) / (2 * step)
        assert abs(got[x][at] - slope) < 2e-2 * abs(slope) + 1e-3


@pytest.mark.parametrize("unified_max", [-200.0, 200.0])
def test_unified_maximum_falls_back(unified_max, monkeypatch):
    """A constant far from the scores would overflow or lose every term; the fallback keeps the result exact."""
    q, k, v = arrays(8)
    want = compiled(impl="ref")(q, k, v, LENGTHS)
    attend = lambda *x: decode(*x, unified_max=unified_max)  # noqa: E731
    checks.assert_close(jax.jit(attend)(q, k, v, LENGTHS), want)
    monkeypatch.setattr(api, "in_range", lambda call, lse, *_: jnp.full(lse.shape, True))
    with pytest.raises(AssertionError, match="relative errors"):
        checks.assert_close(jax.jit(lambda *x: attend(*x))(q, k, v, LENGTHS), want)


@pytest.mark.parametrize("unified_max", [None, 0.0])
def test_invariant_rows(unified_max):
    """A row's bits are the same among short rows, long ones and rows whose scores a unified maximum cannot serve."""
    q, k, v = arrays(9)
    attend = compiled("invariant", block=16, unified_max=unified_max)
    want = attend(q, k, v, jnp.array([77, 0, 0]))
    for lengths, factor in (([77, 80, 80], 1.0), ([77, 3, 41], 1.0), ([77, 80, 80], 1e3)):
        got = attend(q, k.at[1:].multiply(factor), v, jnp.array(lengths))
        assert all((x[0] == y[0]).all() for x, y in zip(got, want, strict=True))


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(counts=st.lists(st.integers(0, 9), min_size=4, max_size=4), begin=st.integers(0, 3))
def test_units(counts, begin):
    """Every live block of every item once, item after item."""
    total, item, block = (np.asarray(x) for x in _units(jnp.full(4, begin), jnp.array(counts) + begin))
    got = list(zip(item[:total], block[:total], strict=True))
    assert got == [(i, begin + b) for i, n in enumerate(counts) for b in range(n)]


_units = jax.jit(functools.partial(units, longest=12))


@pytest.mark.parametrize("whole", [False, True])
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(counts=st.lists(st.integers(0, 9), min_size=6, max_size=6), begin=st.integers(0, 3))
def test_stream_k(whole, counts, begin):
    """Runs of equal size, or for `whole` of whole items, that cover every block; parts where the plan says."""
    workers = 4
    begins, ends = jnp.full(6, begin), jnp.array(counts) + begin
    tables, first, last = jax.tree.map(np.asarray, _plans[whole](begins, ends))
    held, covered = set(), []
    for w in range(workers):
        item, block, unit = tables["first"][w], tables["block"][w], tables["unit"][w]
        while unit < tables["stop"][w]:  # as the kernel walks
            size = min(tables["end"][item] - block, tables["stop"][w] - unit)
            covered += [(item, block + i) for i in range(size)]
            held.add((item, w))
            item, unit = tables["after"][item], unit + size
            block = tables["begin"][item]
    assert covered == [(i, begin + b) for i, n in enumerate(counts) for b in range(n)]
    assert held == {(i, w) for i in range(6) for w in range(first[i], last[i] + 1)}
    assert len({i + w for i, w in held}) == len(held)  # no slot twice
    runs = tables["stop"] - tables["unit"]
    assert runs.max() <= -(-sum(counts) // workers) + (max(counts) if whole else 0)
    assert not whole or len(held) == sum(n > 0 for n in counts)


_plans = {
    whole: jax.jit(functools.partial(gpu._plan, workers=4, whole=whole)) for whole in (False, True)
}  # the tables of Hopper's persistent grid, which any jax can compute


def test_planted_bug(monkeypatch):
    """Negative control: a walk that leaves out the last block of all is caught."""
    q, k, v = arrays(10)
    want = compiled(impl="ref")(q, k, v, LENGTHS)

    def forgetful(*args):
        total, item, block = units(*args)
        return total - 1, item, block

    monkeypatch.setattr(blocked, "units", forgetful)
    with pytest.raises(AssertionError, match="relative errors"):
        checks.assert_close(jax.jit(lambda *x: decode(*x, block=16))(q, k, v, LENGTHS), want)


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
@pytest.mark.parametrize("name", ["all", "unified, transposed"])
def test_tpu_interpreted(name):
    q, k, v = arrays(11, transposed="transposed" in name)
    got = compiled(name, impl="tpu", interpret=True)(q, k, v, LENGTHS)
    checks.assert_close(got, compiled(name, impl="ref")(q, k, v, LENGTHS))


@pytest.mark.parametrize(("bits", "transposed", "tokens"), [(8, True, 16), (4, False, 128), (4, True, 1)])
def test_tpu_interpreted_codes(bits, transposed, tokens):
    """Several blocks; constants a channel over groups within a block and as long as one, and constants a token."""
    q, k, v = checks.normal(12, (2, 2, 1, 16), (2, 1, 384, 16), (2, 1, 384, 16))
    k = jnp.swapaxes(k, 2, 3) if transposed else k
    keys = quick_quantize(k, bits=bits, tokens=tokens, channels=1 if tokens > 1 else None, transposed=transposed)
    values, lengths = quick_quantize(v, bits=bits, symmetric=True), jnp.array([300, 128])
    forms = (
        compiled(transposed=transposed, block=128, **how)
        for how in ({"impl": "tpu", "interpret": True}, {"impl": "ref"})
    )
    got, want = (form(q, keys, values, lengths) for form in forms)
    checks.assert_close(got, want)


def test_tpu_interpreted_gradient():
    q, k, v = arrays(13)

    def f(impl, q, k, v):
        return (decode(q, k, v, LENGTHS, impl=impl, interpret=impl == "tpu")[0] ** 2).sum()

    got, want = (jax.jit(jax.grad(functools.partial(f, impl), (0, 1, 2)))(q, k, v) for impl in ("tpu", "blocked"))
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
        pytest.param(None, {"invariant": True}, marks=pytest.mark.slow),
    ],
    ids=["options", "transposed", "int8", "int8 transposed", "int4", "int4 transposed", "invariant"],
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
@pytest.mark.slow
def test_gpu_invariant_rows(monkeypatch):
    """Pieces of one block, on three workers: a row's bits are the same whatever runs the other rows' lengths make."""
    monkeypatch.setattr(gpu, "PIECE", 1)
    q, k, v = checks.normal(15, (2, 1, 1, 64), (2, 1, 192, 64), (2, 1, 192, 64), dtype="bfloat16")
    attend = jax.jit(functools.partial(decode, impl="gpu", interpret=True, block=64, invariant=True))
    want, got = (attend(q, k, v, jnp.array([170, n])) for n in (0, 190))
    assert all((a[0] == b[0]).all() for a, b in zip(got, want, strict=True))
    checks.assert_close(got, decode(q, k, v, jnp.array([170, 190]), impl="ref"), "bfloat16")


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
