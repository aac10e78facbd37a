"""The pipeline over denoising steps: equal to frame after frame, as a batch and on devices; what streams make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import pipeline, streamdiffusion
from jaxinfer.flow.pipeline import Pipeline, sequential
from jaxinfer.flow.solve import euler
from jaxinfer.flow.streamdiffusion import Context, SimilarityFilter, StreamDiffusion
from jaxinfer.flow.types import Condition, Out
from jaxinfer.sharding.timestep_pipeline import TimestepPipeline

T, F, D = 4, 7, 5
KEY = jax.random.key(0)
FRAMES = jax.random.normal(jax.random.key(1), (F, D))
PARAMS = {"in": jax.random.normal(jax.random.key(2), (D, 16)), "out": jax.random.normal(jax.random.key(3), (16, D)) / 4}


def stage(params, x, k, resident):
    """A step that reads a ring of the last three frames that it has seen at its own noise level, and writes it."""
    ring, count = resident
    filled = jnp.arange(3) < jnp.minimum(count, 3)[:, None]
    scores = jnp.where(filled, jnp.einsum("rd,rcd->rc", x, ring), -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([scores, jnp.zeros((len(x), 1))], 1), 1)[:, :3]
    seen = jnp.einsum("rc,rcd->rd", weights, ring)
    after = x + 0.2 * jnp.tanh((x + seen) @ params["in"] + 0.3 * k[:, None]) @ params["out"]
    ring = jax.vmap(lambda buffer, row, at: buffer.at[at % 3].set(row))(ring, x, count)
    return after, (ring, count + 1)


def residents():
    return jnp.zeros((T, 3, D)), jnp.zeros(T, jnp.int32)


@pytest.fixture(scope="module")
def one_by_one():
    return sequential(Pipeline(stage, T), PARAMS, FRAMES, residents())


@pytest.mark.smoke
def test_stream_batch_equals_sequential(one_by_one):
    pipe = Pipeline(stage, T)
    state, out = jax.jit(pipe.run)(PARAMS, pipe.init(FRAMES[0], residents()), FRAMES)
    np.testing.assert_allclose(out, one_by_one[0], rtol=1e-5, atol=1e-6)
    for mine, want in zip(state.resident, one_by_one[1], strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)
    assert not state.live.any()


def test_rubbish_in_a_cache_is_caught(one_by_one, monkeypatch):
    """Negative control: steps that write their caches while no frame is there yet."""
    monkeypatch.setattr(pipeline, "keep", lambda live, new, old: new)
    pipe = Pipeline(stage, T)
    _, out = pipe.run(PARAMS, pipe.init(FRAMES[0], residents()), FRAMES)
    assert float(jnp.abs(out - one_by_one[0]).max()) > 1e-2


def test_live_says_when_frames_come_out():
    pipe = Pipeline(lambda params, x, k, r: (x + 1, r), 3)
    state, seen = pipe.init(jnp.zeros(())), []
    for i, live in enumerate([True, True, False, True, False, False]):
        state, out = pipe.tick(None, state, jnp.asarray(10.0 * i), live)
        seen.append((bool(out.live), float(out.frame)) if out.live else None)
    assert seen == [None, None, (True, 3.0), (True, 13.0), None, (True, 33.0)]


@pytest.mark.parametrize("devices", [4, 2])
def test_devices_equal_the_batch(devices, one_by_one):
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("step",))
    spread = TimestepPipeline(Pipeline(stage, T), mesh)
    state = spread.init(FRAMES[0], residents())
    assert state.resident[0].sharding.shard_shape((T, 3, D)) == (T // devices, 3, D)
    compiled = jax.jit(spread.run).lower(PARAMS, state, FRAMES).compile()
    state, out = compiled(PARAMS, state, FRAMES)
    np.testing.assert_allclose(out, one_by_one[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.resident[0], one_by_one[1][0], rtol=1e-5, atol=1e-6)
    # Frames pass from device to device, caches do not.
    assert "collective-permute" in compiled.as_text() and f"[{T},3,{D}]" not in compiled.as_text()


@pytest.mark.slow
def test_a_wrong_neighbour_is_caught(one_by_one, monkeypatch):
    """Negative control: frames handed on within a device but not to the next."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("step",))
    monkeypatch.setattr(TimestepPipeline, "_hand_on", lambda self, rows: jnp.roll(rows, 1, 0))
    spread = TimestepPipeline(Pipeline(stage, T), mesh)
    _, out = jax.jit(spread.run)(PARAMS, spread.init(FRAMES[0], residents()), FRAMES)
    assert float(jnp.abs(out - one_by_one[0]).max()) > 1e-2


# A velocity model of one hidden layer, with labels.
def apply(params, x, t, s, cond, *, seg=None, features=None):
    label = jnp.where(cond.labels < 0, -0.5, cond.labels.astype(jnp.float32))[:, None]
    return Out(jnp.tanh(x @ params["in"] + t[:, None] + 0.3 * label) @ params["out"], {})


TS = (0.2, 0.4, 0.6, 0.8, 1.0)
CONTEXT = Context(PARAMS, Condition(labels=jnp.asarray([2])), jax.random.normal(jax.random.key(4), (T, D)))


def outputs(stream, context=CONTEXT):
    pipe = stream.pipeline
    frames = jax.vmap(lambda x: stream.admit(context, x))(FRAMES)
    state = pipe.init(jax.tree.map(lambda x: x[0], frames))
    return jax.jit(pipe.run)(context, state, frames)[1].x


def by_hand(stream, latents, noise=CONTEXT.noise):
    """One frame through the steps, as the paper has it for one image."""
    x, source = TS[0] * latents + (1 - TS[0]) * noise[0], latents
    labels = lambda c: Condition(labels=jnp.asarray([c]))  # noqa: E731
    for k, (t, s) in enumerate(zip(TS[:-1], TS[1:], strict=True)):
        v, v_null = (apply(PARAMS, x[None], *(jnp.asarray([t]),) * 2, labels(c)).v[0] for c in (2, -1))
        if stream.guidance == "onetime" and k == 0:
            source = x + (1 - t) * v_null
        if stream.guidance in ("self", "onetime"):
            v_null = (source - x) / (1 - t)
        if stream.guidance != "none":
            v = stream.delta * v_null + stream.scale * (v - stream.delta * v_null)
        x = x + (s - t) * v if not stream.renoise else s * (x + (1 - t) * v) + (1 - s) * noise[min(k + 1, T - 1)]
    return x


@pytest.mark.parametrize("guidance", streamdiffusion.GUIDANCE)
def test_streams_equal_one_frame_by_hand(guidance):
    stream = StreamDiffusion(apply, TS, guidance, scale=1.4, delta=1.0)
    want = jnp.stack([by_hand(stream, frame) for frame in FRAMES[:2]])
    np.testing.assert_allclose(outputs(stream)[:2], want, rtol=1e-4, atol=1e-5)


def test_euler_steps_are_the_solvers():
    stream = StreamDiffusion(apply, TS, "none", renoise=False)
    x = TS[0] * FRAMES + (1 - TS[0]) * CONTEXT.noise[0]
    cond = Condition(labels=jnp.full(F, 2))
    want = euler(lambda x, t, c: (apply(PARAMS, x, t, t, cond).v, c), x, TS).x
    np.testing.assert_allclose(outputs(stream), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_limits_of_residual_guidance():
    """At scale 1 it is none; with the unconditional end point as its source it is classifier-free guidance."""
    plain = outputs(StreamDiffusion(apply, TS, "none"))
    for guidance in ("self", "onetime"):
        one = outputs(StreamDiffusion(apply, TS, guidance, scale=1.0))
        np.testing.assert_allclose(one, plain, rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(outputs(StreamDiffusion(apply, TS, guidance, scale=1.4)) - plain).max()) > 1e-2
    # A null whose velocity leads straight to one point: onetime and full guidance agree to the end of a stream.
    point = jnp.arange(D) / D

    def straight(params, x, t, s, cond, *, seg=None, features=None):
        v = apply(params, x, t, s, cond).v
        return Out(jnp.where(cond.labels[:, None] < 0, (point - x) / (1 - t[:, None]), v), {})

    both = [outputs(StreamDiffusion(straight, TS, g, scale=1.4)) for g in ("full", "onetime")]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4, atol=1e-4)
    # Negative control: the self variant starts from another source.
    assert float(jnp.abs(outputs(StreamDiffusion(straight, TS, "self", scale=1.4)) - both[0]).max()) > 1e-2


@pytest.mark.slow
def test_the_guide_of_a_solver_is_the_same():
    stream = StreamDiffusion(apply, TS, "onetime", scale=1.4, renoise=False)
    x = TS[0] * FRAMES + (1 - TS[0]) * CONTEXT.noise[0]
    velocity = lambda c: lambda x, t, carry: (apply(PARAMS, x, t, t, Condition(labels=jnp.full(F, c))).v, carry)  # noqa: E731
    source = streamdiffusion.first_estimate(velocity(-1), x, jnp.full(F, TS[0]))
    want = euler(streamdiffusion.residual_guide(velocity(2), source, scale=1.4), x, TS).x
    np.testing.assert_allclose(outputs(stream), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rows_a_tick():
    """What each guidance evaluates: T, 2 T, T and T + 1 rows."""
    rows = {}
    for guidance in streamdiffusion.GUIDANCE:
        seen = []

        def counting(params, x, *args, seen=seen, **kwargs):
            seen.append(len(x))
            return apply(params, x, *args, **kwargs)

        outputs(StreamDiffusion(counting, TS, guidance))
        rows[guidance] = seen[0]
    assert rows == {"none": T, "full": 2 * T, "self": T, "onetime": T + 1}


def test_similarity_filter():
    chosen = SimilarityFilter(threshold=0.9, most=3)
    pipe = Pipeline(lambda params, x, k, r: (x + 1, r), 1)
    a = jnp.asarray([1.0, 0.0])

    @jax.jit
    def tick(key, state, frame):
        return chosen.tick(key, state, frame, lambda inner: pipe.tick(None, inner, frame))

    inner = pipe.init(a)
    start = chosen.init(inner, a, jax.eval_shape(pipe.tick, None, inner, a)[1])
    state, worked = start, []
    for i in range(9):
        before = int(state.skipped)
        state, out = tick(jax.random.fold_in(KEY, i), state, a)
        worked.append(int(state.skipped) == before)
        np.testing.assert_array_equal(out.frame, a + 1)
    assert worked == [True, False, False, False] * 2 + [True]  # the same frame is skipped, but not for ever
    other = jnp.asarray([0.0, 1.0])
    state, out = tick(KEY, tick(KEY, start, a)[0], other)
    np.testing.assert_array_equal(out.frame, other + 1)  # one that differs never is
    # In between the share of skips is the probability, here for a cosine of 0.95: one half.
    between = jnp.asarray([0.95, np.sqrt(1 - 0.95**2)])
    assert float(chosen.probability(between, a)) == pytest.approx(0.5, abs=1e-5)
    state = tick(KEY, start, a)[0]
    skips = jax.vmap(lambda key: tick(key, state, between)[0].skipped)(jax.random.split(KEY, 800))
    assert abs(float(skips.mean()) - 0.5) < 0.07
    assert float(SimilarityFilter(0.0).probability(between, a)) == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Pipeline(stage, 0), ConfigError, "depth: got 0"),
        (lambda: Pipeline(stage, T).init(FRAMES[0], jnp.zeros((3, D))), InputError, r"resident: got shape \(3, 5\)"),
        (lambda: TimestepPipeline(Pipeline(stage, T), mesh(3)), ConfigError, "4 steps cannot be split over 3 devices"),
        (lambda: TimestepPipeline(Pipeline(stage, T), mesh(2), "time"), ConfigError, "axis: got 'time'"),
        (lambda: StreamDiffusion(apply, (0.0, 0.5)), ConfigError, "ends at 0.5, accepts one that ends at 1"),
        (lambda: StreamDiffusion(apply, (0.5, 0.5, 1.0)), InputError, "a grid must increase"),
        (lambda: StreamDiffusion(apply, TS, "half"), ConfigError, "guidance: got 'half'"),
        (lambda: SimilarityFilter(1.0), ConfigError, "threshold: got 1.0"),
        (lambda: SimilarityFilter(most=-1), ConfigError, "most: got -1"),
    ],
    ids=["depth", "resident", "devices", "axis", "end", "grid", "guidance", "threshold", "most"],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def mesh(devices):
    return Mesh(np.asarray(jax.devices()[:devices]), ("step",))


def test_settings_are_hashable():
    """So that streams can be static under jit."""
    assert hash(StreamDiffusion(apply, TS)) == hash(dataclasses.replace(StreamDiffusion(apply, TS)))
