"""MeanFlow on the flow between two Gaussians, whose mean velocity is known; guidance, weights, the curriculum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import meanflow, objective, schedule
from jaxinfer.flow.meanflow import Curriculum, MeanFlow, Staged, TargetGuidance
from jaxinfer.flow.paths import interpolate
from jaxinfer.flow.times import Pair, Uniform
from jaxinfer.flow.types import Batch, Condition, Out, Times

KEY = jax.random.key(0)
MEAN, STD = jnp.asarray([1.0, -0.5]), jnp.asarray([0.5, 1.7])


def place(x0, t):
    """Where the flow from N(0, 1) to N(MEAN, STD^2) takes x0 by time t[B, 1]."""
    return t * MEAN + jnp.sqrt((1 - t) ** 2 + (t * STD) ** 2) * x0


def velocity(x, t):
    t = t[:, None]
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def mean_velocity(x, t, s):
    """(where s is - x) / (s - t), with the instantaneous velocity where s = t."""
    wide = jnp.where(s > t, s - t, 1.0)[:, None]
    x0 = (x - t[:, None] * MEAN) / jnp.sqrt((1 - t[:, None]) ** 2 + (t[:, None] * STD) ** 2)
    return jnp.where((s > t)[:, None], (place(x0, s[:, None]) - x) / wide, velocity(x, t))


def apply(params, x, t, s, cond, *, seg=None, features=None):
    """The true mean velocity at params = 0; each parameter changes it its own way."""
    u = mean_velocity(x, t, s)
    return Out((1 + params[0]) * u + params[1] + params[2] * x, {})


FEW = jax.random.normal(jax.random.key(9), (16, 2))


def data(n, key=KEY):
    return Batch(MEAN + STD * jax.random.normal(key, (n, 2)))


@pytest.mark.smoke
def test_identity():
    """u - (s - t) du/dt is the velocity; with x held still in the derivative it is not."""
    x0 = jax.random.normal(KEY, (64, 2))
    t = jnp.linspace(0.0, 0.7, 64)
    times = Times(t, t + 0.25, jnp.zeros(64, jnp.int32))
    x = place(x0, t[:, None])

    @jax.jit
    def left(tangent):
        u, du = meanflow.with_derivative(apply, jnp.zeros(3), x, times, None, tangent)
        return u - 0.25 * du - velocity(x, t)

    assert float(jnp.abs(left(velocity(x, t))).max()) < 2e-5
    assert float(jnp.abs(left(jnp.zeros_like(x))).max()) > 0.1


def gradient(spec, n=20_000):
    """The gradient at the truth, over its standard error, f32[3]: about 1 where the truth is a minimum."""
    batch = data(n)
    times = spec.times(jax.random.key(5), n)
    x0 = jax.random.normal(jax.random.key(6), (n, 2))
    x, v = interpolate(spec.path, x0, batch.x1, times.t)
    errors = lambda p: meanflow.mean_flow_errors(spec, apply, p, x, v, times, None)  # noqa: E731
    rows = jax.jit(jax.jacfwd(errors))(jnp.zeros(3))
    return np.asarray(rows.mean(0) / (rows.std(0) / np.sqrt(n)))


@pytest.mark.parametrize("variant", meanflow.VARIANTS)
def test_the_truth_is_a_minimum(variant):
    spec = MeanFlow(variant=variant, times=Pair(0.25, Uniform()), power=0.0)
    assert np.abs(gradient(spec)).max() < 4


@pytest.mark.parametrize("plant", ["still", *(pytest.param(p, marks=pytest.mark.slow) for p in ("sign", "ends"))])
def test_a_wrong_target_is_caught(plant, monkeypatch):
    """Negative controls, all of the right shapes: x held still in the derivative, its sign, and s moved with t."""
    right = meanflow.with_derivative

    def wrong(apply, params, x, times, cond, tangent):
        if plant == "ends":
            ones = jnp.ones_like(times.t)
            return jax.jvp(lambda *a: apply(params, *a, cond).v, (x, times.t, times.s), (tangent, ones, ones))
        u, du = right(apply, params, x, times, cond, jnp.zeros_like(tangent) if plant == "still" else tangent)
        return u, -du if plant == "sign" else du

    monkeypatch.setattr(meanflow, "with_derivative", wrong)
    assert np.abs(gradient(MeanFlow(times=Pair(0.25, Uniform()), power=0.0))).max() > 10


def test_instantaneous_rows_are_flow_matching():
    """With s = t everywhere the errors and their gradients are those of flow matching."""
    spec = MeanFlow(reduction="mean")
    t = jnp.linspace(0.1, 0.9, 64)
    times, x0, x1 = Times(t, t, jnp.zeros(64, jnp.int32)), jax.random.normal(KEY, (64, 2)), data(64).x1

    @jax.jit
    def both(params):
        x, v = interpolate(spec.path, x0, x1, t)
        mine = lambda p: meanflow.mean_flow_errors(spec, apply, p, x, v, times, None).mean()  # noqa: E731
        plain = lambda p: objective.fm_losses(apply, p, spec.path, times, x0, x1, None).mean()  # noqa: E731
        return [jax.value_and_grad(f)(params) for f in (mine, plain)]

    mine, plain = both(jnp.asarray([0.1, -0.2, 0.3]))
    np.testing.assert_allclose(mine[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(mine[1], plain[1], rtol=1e-5)


def test_loss_is_weighted_by_its_own_error():
    times = lambda key, n: Times(jnp.full(n, 0.3), jnp.full(n, 0.8), jnp.zeros(n, jnp.int32))  # noqa: E731
    spec, batch = MeanFlow(drop_rate=0.0, times=times), data(16).replace(x0=FEW)
    params = jnp.asarray([0.1, -0.2, 0.3])
    both = (spec, dataclasses.replace(spec, power=0.0))
    (loss, metrics), (plain, same) = jax.jit(lambda p: [o(apply, p, KEY, batch) for o in both])(params)
    assert 0.5 < float(loss) < 1 < float(plain)  # e / (e + c) is just below 1
    assert float(metrics["unweighted_loss"]) == pytest.approx(float(plain)) == float(same["unweighted_loss"])


def test_any_number_of_steps_samples_exactly():
    x0 = jax.random.normal(KEY, (32, 2))

    @jax.jit
    def ends(x0):
        u = meanflow.mean_velocity_of(apply, jnp.zeros(3), None)
        wrong = lambda x, t, s, c: (velocity(x, t), c)  # noqa: E731
        exact = [meanflow.solve_mean(u, x0, schedule.uniform(k)).x for k in (1, 3)]
        return exact, meanflow.solve_mean(wrong, x0, schedule.uniform(1)).x, place(x0, jnp.ones((32, 1)))

    exact, instantaneous, want = ends(x0)
    for end in exact:
        np.testing.assert_allclose(end, want, atol=2e-5)
    assert float(jnp.abs(instantaneous - want).max()) > 0.3  # in one step the instantaneous velocity does not


def constant(params, x, t, s, cond, *, seg=None, features=None):
    """2 under the null, 5 under a label, plus a parameter."""
    return Out(jnp.where(cond.labels < 0, 2.0, 5.0)[:, None] * jnp.ones_like(x) + params, {})


def goal(spec, labels):
    """The target that a row has, read off the loss: its root is the distance to the model's 2 or 5."""
    times = Times(*(jnp.full(2, 0.5),) * 2, jnp.zeros(2, jnp.int32))
    x, v = jnp.zeros((2, 1)), jnp.full((2, 1), 1.0)
    errors = jax.jit(lambda c: meanflow.mean_flow_errors(spec, constant, jnp.zeros(()), x, v, times, c))
    return np.where(np.asarray(labels) < 0, 2.0, 5.0) - np.sqrt(errors(Condition(labels=jnp.asarray(labels))))


def test_guidance_inside_the_target():
    """v = 1, the model says 2 and 5: 0.3 v + 0.9 * 5 - 0.2 * 2 is MeanAudio's; labels that are dropped keep v."""
    audio = meanflow.mean_audio()
    assert audio.guidance.effective == pytest.approx(3)
    np.testing.assert_allclose(goal(audio, [4, -1]), [0.3 + 4.5 - 0.4, 0.3 * 1 + 0.7 * 2], rtol=1e-5)
    plain = MeanFlow(guidance=TargetGuidance(2.0))
    np.testing.assert_allclose(goal(plain, [4, -1]), [2 + 2 * (1 - 2), 1], rtol=1e-5)
    np.testing.assert_allclose(goal(MeanFlow(guidance=TargetGuidance(1.0)), [4, -1]), [1, 1], rtol=1e-5)
    outside = MeanFlow(guidance=TargetGuidance(2.0, start=0.6))
    np.testing.assert_allclose(goal(outside, [4, -1]), [1, 1], rtol=1e-5)
    assert TargetGuidance.of(4.0).effective == pytest.approx(4)


def test_curriculum_is_one_objective_and_then_the_other():
    """The loss and the gradient of the one, then of the other, in one compiled program."""

    def named(power):
        return lambda apply, params, key, batch: ((params * batch.x1).sum() ** power, {})

    both = Curriculum(named(1), named(2), steps=3)
    run = jax.jit(jax.value_and_grad(lambda p, s: both(apply, p, KEY, s)[0]))
    for step, loss, grad in ((2, 6.0, 3.0), (3, 36.0, 36.0)):
        got = run(jnp.asarray(2.0), Staged(Batch(jnp.asarray([1.0, 2.0])), both.stage(step)))
        assert (float(got[0]), float(got[1])) == (loss, grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanFlow(variant="best"), "variant: got 'best', accepts original, improved"),
        (lambda: MeanFlow(reduction="max"), "reduction: got 'max'"),
        (lambda: MeanFlow(offset=0.0), "offset: got 0.0"),
        (lambda: TargetGuidance(1.0, mix=1.0), "0 <= mix < 1"),
        (lambda: TargetGuidance(start=0.5, end=0.5), r"times \[0.5, 0.5\]"),
        (lambda: TargetGuidance.of(0.5), "accepts 1 or more"),
        (lambda: Curriculum(MeanFlow(), MeanFlow(), -1), "steps: got -1"),
    ],
    ids=["variant", "reduction", "offset", "mix", "interval", "scale", "steps"],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_guidance_needs_a_condition():
    with pytest.raises(InputError, match="needs a condition to leave out"):
        MeanFlow(guidance=TargetGuidance(2.0))(apply, jnp.zeros(3), KEY, data(4))
