"""What all ops share: the form that fits is taken, one asked for by name serves or says why not, bad input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, choose, dispatch, jax_version, why_not
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError

FORMS = (
    Form("tpu", lambda call, x: x + 1000, platform="tpu", refuses=lambda call: "too small" if call < 8 else None),
    Form("gpu", lambda call, x: x + 100, platform="cuda"),
    Form("blocked", lambda call, x: x + 10),
    Form("ref", lambda call, x: x + 2, automatic=False),
)


@pytest.mark.smoke
def test_where_it_runs_decides():
    """One program, lowered for each platform, holds that platform's form and no other."""
    run = jax.jit(lambda x: dispatch("op", FORMS, 8, x))
    assert int(run(jnp.int32(0))) == 10

    def constant(platform):
        text = run.trace(jax.ShapeDtypeStruct((), jnp.int32)).lower(lowering_platforms=(platform,)).as_text()
        return [n for n in (1000, 100, 10) if f"dense<{n}>" in text]

    assert [constant(p) for p in ("tpu", "cuda", "cpu")] == [[1000], [100], [10]]


def test_a_form_that_refuses_is_passed_over():
    assert [choose(FORMS, 7, p).name for p in ("tpu", "cuda", None)] == ["blocked", "gpu", "blocked"]
    assert why_not(FORMS, 7, "tpu") == {"tpu": "too small", "gpu": "code for cuda"}


def test_a_form_asked_for_by_name_serves_or_raises():
    assert dispatch("op", FORMS, 8, 0, impl="tpu") == 1000
    assert dispatch("op", FORMS, 8, 0, impl="ref") == 2
    with pytest.raises(UnsupportedError, match="op: impl='tpu' cannot serve this call: too small"):
        dispatch("op", FORMS, 7, 0, impl="tpu")
    with pytest.raises(ArgumentError, match="op: impl: got 'x', accepts 'tpu', 'gpu', 'blocked', 'ref'"):
        dispatch("op", FORMS, 8, 0, impl="x")


def test_nothing_that_runs_anywhere_is_said():
    with pytest.raises(UnsupportedError, match="op: no form runs anywhere"):
        dispatch("op", FORMS[:2], 8, 0)


def test_shapes_bind_letters_across_arguments():
    x, y = np.zeros((2, 3, 4)), np.zeros((2, 5))
    assert check.shapes("op", x=(x, "B T d"), y=(y, "B n")) == {"B": 2, "T": 3, "d": 4, "n": 5}
    for arguments, message in [
        ({"x": (x, "B T")}, r"op: x: got \[2, 3, 4\], accepts an array \[B, T\]"),
        ({"x": (x, "B T d"), "y": (y, "B d")}, r"op: y: got \[2, 5\], accepts \[B, d\] with B = 2, d = 4"),
        ({"x": (x, "B 7 d")}, r"op: x: got \[2, 3, 4\]"),
        ({"x": (3.0, "B")}, "op: x: got float"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            check.shapes("op", **arguments)


def test_dtypes_numbers_and_choices():
    x, y = jnp.zeros(2), jnp.zeros(2, jnp.bfloat16)
    assert check.dtypes("op", x=x) == "float32"
    for run, message in [
        (lambda: check.dtypes("op", x=x, y=y), "op: y: got bfloat16, accepts the dtype of x, float32"),
        (lambda: check.dtypes("op", ("int8",), x=x), "op: x: got float32, accepts int8"),
        (lambda: check.integers("op", x=x), "op: x: got float32, accepts integers"),
        (lambda: check.positive("op", n=True), "op: n: got True, accepts an integer of at least 1"),
        (lambda: check.positive("op", n=0), "op: n: got 0"),
        (lambda: check.within("op", 0, 3, n=np.array([[0, 4]])), r"op: n\[0, 1\]: got 4, accepts 0 to 3"),
        (lambda: check.choice("op", "mode", "c", ("a", "b")), "op: mode: got 'c', accepts 'a', 'b'"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            run()
    check.positive("op", n=None)


def test_traced_values_are_not_read():
    jax.jit(lambda n: check.within("op", 0, 3, n=n))(jnp.array([9]))


def test_versions_compare_as_numbers():
    assert jax_version() >= (0, 10, 2) and (0, 11, 2) > (0, 10, 12)
