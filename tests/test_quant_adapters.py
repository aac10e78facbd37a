"""Adapters as leaves: each kind starts as its base, equals its dense form in value and gradient, merges, unmerges."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops, quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.quant import soka

K, N, E, T = 24, 32, 2, 6
KEY = jax.random.key(0)
KINDS = {"lora": quant.Lora(4, alpha=8), "paca": quant.Paca(4), "soka": quant.Soka(3), "hydra": quant.Hydra(4, alpha=2)}
BASES = {"array": lambda w: w, "int4": quant.Int4(group=8).quantize}
# Compiling dominates these tests: LLVM's optimisations are left out where rounding is no claim.
SIZES = jnp.array([4, 2], jnp.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(1, T, K)


def moved(leaf, by=0.3):
    """The leaf after some training: every trained array somewhere else."""
    arrays = {name: getattr(leaf, name) for name in leaf.TRAINED}
    return dataclasses.replace(leaf, **{n: a + by * normal(i, *a.shape) for i, (n, a) in enumerate(arrays.items())})


def used(w):
    """What a weight does: a product, the product over experts where it is a stack, and its dense form."""
    if len(w.shape) == 3:
        return {"ragged": ops.ragged_dot(X, w, SIZES), "dense": ops.materialize(w)}
    return {"dot": ops.dot(X, w), "dense": ops.materialize(w)}


def leaves_of_all_kinds():
    out = {}
    for name, spec in KINDS.items():
        for base, of in BASES.items():
            out[name, base] = spec.adapt(of(normal(2, K, N)), KEY)
        out[name, "experts"] = spec.adapt(normal(3, E, K, N), KEY)
    return out


@pytest.fixture(scope="module")
def fresh():
    return leaves_of_all_kinds()


use_all = jax.jit(lambda tree: {key: used(leaf) for key, leaf in tree.items()})


def test_a_fresh_adapter_is_exactly_its_base(fresh):
    ours, theirs = use_all(fresh), use_all({key: leaf.base for key, leaf in fresh.items()})
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # With all of the compiler's optimisations, which may contract a product and a difference.
    plain = [leaf for key, leaf in fresh.items() if key[1] == "array"] + [quant.Soka(1).adapt(normal(2, K, N), KEY)]
    want = jax.jit(ops.dot)(X, plain[0].base)
    for y in jax.jit(lambda leaves: [ops.dot(X, leaf) for leaf in leaves])(plain):
        np.testing.assert_array_equal(y, want)


def test_products_are_those_of_the_merged_weight(fresh):
    tree = {key: moved(leaf) for key, leaf in fresh.items()}
    found = use_all(tree)
    for key, leaf in tree.items():
        leaf.check()
        dense, base = np.asarray(found[key]["dense"], np.float64), np.asarray(ops.materialize(leaf.base))
        assert np.abs(dense - base).max() > 0.1, key
        if key[1] == "experts":
            want = np.concatenate([X[:4] @ dense[0], X[4:] @ dense[1]])
            np.testing.assert_allclose(found[key]["ragged"], want, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_allclose(found[key]["dot"], X @ dense, rtol=1e-4, atol=1e-4)


def projected(leaf, g):
    """The gradient `g` of the dense weight, projected on the trained arrays by hand."""
    g, get = np.asarray(g, np.float64), lambda name: np.asarray(getattr(leaf, name), np.float64)
    if isinstance(leaf, quant.SokaArray):
        (_, m, n), (_, p, q) = leaf.u.shape, leaf.v.shape
        blocks = g.reshape(m, p, n, q).transpose(0, 2, 1, 3)  # [i, j] is block (i, j)
        u, v = np.einsum("ijkl,rkl->rij", blocks, get("v")), np.einsum("ijkl,rij->rkl", blocks, get("u"))
        return {"u": u, "v": v}
    if isinstance(leaf, quant.PacaArray):
        return {"delta": leaf.scale * g[leaf.index]}
    g = leaf.scale * g
    out = {"a": g @ get("b").T, "b": get("a").T @ g}
    if isinstance(leaf, quant.HydraArray):
        w = np.asarray(ops.materialize(leaf.base), np.float64)
        out |= {"c": w.T @ g @ get("d").T, "d": (w @ get("c")).T @ g}
    return out


def test_gradients_are_the_dense_gradient_projected(fresh):
    def value(trained, x, frozen):
        return jnp.sum(jnp.sin(ops.dot(x, quant.join({"w": trained}, {"w": frozen})["w"])))

    tree = {key: moved(leaf) for key, leaf in fresh.items() if key[1] != "experts"}
    parts = {key: [part["w"] for part in quant.split({"w": leaf})] for key, leaf in tree.items()}
    grad = jax.grad(value, (0, 1))
    ours = jax.jit(lambda parts: {key: grad(t, X, f) for key, (t, f) in parts.items()})(parts)
    for key, leaf in tree.items():
        dense = np.asarray(ops.materialize(leaf), np.float64)
        dy = np.cos(np.asarray(X) @ dense)
        for name, want in projected(leaf, np.asarray(X).T @ dy).items():
            np.testing.assert_allclose(ours[key][0][name], want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
        np.testing.assert_allclose(ours[key][1], dy @ dense.T, rtol=1e-3, atol=1e-3)


def test_a_planted_bug_of_each_kind_is_seen(fresh):
    """The two checks above, given leaves that are a little wrong."""
    bugs = {
        "lora": lambda leaf: dataclasses.replace(leaf, scale=2 * leaf.scale),
        "paca": lambda leaf: dataclasses.replace(leaf, index=(leaf.index + 1) % K),
        "soka": lambda leaf: dataclasses.replace(leaf, u=leaf.u.transpose(0, 2, 1).reshape(leaf.u.shape)),
        "hydra": lambda leaf: dataclasses.replace(leaf, c=leaf.c[::-1]),  # branches of two matrices mixed up
    }
    for name, plant in bugs.items():
        leaf = moved(fresh[name, "array"])
        wrong = plant(leaf)
        assert np.abs(ops.dot(X, wrong) - X @ ops.materialize(leaf)).max() > 1e-2, name
        g = normal(5, K, N)
        one, two = projected(leaf, g), projected(wrong, g)
        assert max(np.abs(one[n] - two[n]).max() for n in one) > 1e-2, name


def kept(leaf):
    """Shapes of what the backward pass of a product keeps: the leaves of the function that `jax.vjp` returns."""
    trained, frozen = quant.split({"w": leaf})
    x = jax.ShapeDtypeStruct((5, T, K), jnp.float32)

    def backward(x, trained):
        return jax.vjp(lambda x, t: ops.dot(x, quant.join(t, frozen)["w"]), x, trained)[1]

    return [tuple(a.shape) for a in jax.tree.leaves(jax.eval_shape(backward, x, trained))]


def test_paca_keeps_the_chosen_activations_only(fresh):
    for base in ("array", "int4"):
        shapes = kept(fresh["paca", base])
        assert (5, T, 4) in shapes and (5, T, K) not in shapes, shapes
    assert (5, T, K) in kept(fresh["lora", "array"])  # the control: LoRA needs all of x

    def plain(x, delta, leaf=fresh["paca", "array"]):  # as one would write it without thinking of it
        return x @ leaf.base.at[leaf.index].add(leaf.scale * delta)

    x, delta = jax.ShapeDtypeStruct((T, K), jnp.float32), jax.ShapeDtypeStruct((4, N), jnp.float32)
    naive = jax.eval_shape(lambda x, d: jax.vjp(plain, x, d)[1], x, delta)
    assert (T, K) in [tuple(a.shape) for a in jax.tree.leaves(naive)]


def test_soka_keeps_no_second_copy_of_the_weight(fresh):
    """Its dense update is made anew; a base that is an argument is not kept for it either."""
    leaf = fresh["soka", "array"]
    trained, frozen = quant.split({"w": leaf})

    def backward(x, trained, frozen):
        return jax.vjp(lambda x, t: ops.dot(x, quant.join(t, frozen)["w"]), x, trained)[1]

    out = jax.eval_shape(backward, jax.ShapeDtypeStruct((T, K), jnp.float32), trained, frozen)
    assert [tuple(a.shape) for a in jax.tree.leaves(out)].count((K, N)) == 1  # the base itself


def test_the_rearranged_kronecker_product_is_an_outer_product():
    u, v, w = normal(1, 4, 5), normal(2, 6, 3), normal(3, K, N)
    np.testing.assert_array_equal(soka.rearrange(jnp.kron(u, v), 4, 5), jnp.outer(u.ravel(), v.ravel()))
    blocks = soka.rearrange(w, 4, 4).reshape(4, 4, 6, 8)
    np.testing.assert_array_equal(blocks[2, 3], w[12:18, 24:32])
    s, left, right = soka.kronecker_svd(w, 4, 4)
    assert s.shape == (16,) and left.shape == (16, 4, 4) and right.shape == (16, 6, 8)
    np.testing.assert_allclose(soka.kronecker_sum(left * s[:, None, None], right), w, atol=1e-5)
    two = soka.kronecker_sum(left[:2] * s[:2, None, None], right[:2])  # the best of rank 2: Eckart and Young
    np.testing.assert_allclose(jnp.sum((w - two) ** 2), jnp.sum(s[2:] ** 2), rtol=1e-4)
    wrong = w.reshape(4, 6, 4, 8).reshape(16, 48)  # the planted bug: rows of the matrix for blocks
    assert np.abs(np.linalg.svd(wrong, compute_uv=False) - s).max() > 0.1


def test_sokas_rank_follows_the_spectrum():
    assert soka.choose_rank([10, 9, 1, 1, 1, 1], energy=1.0, max_rank=16) == 3  # the elbow
    assert soka.choose_rank([10, 9, 1, 1, 1, 1], energy=0.5, max_rank=16) == 1  # 100 of 185
    assert soka.choose_rank([10, 9, 1, 1, 1, 1], energy=0.9, max_rank=16) == 2  # 181 of 185
    assert soka.choose_rank([4, 3, 2, 1], energy=1.0, max_rank=16) == 4  # a straight line has no elbow
    assert soka.choose_rank([4, 3, 2, 1], energy=1.0, max_rank=2) == 2
    assert soka.choose_rank([0, 0], energy=0.9, max_rank=4) == 1
    two = jnp.kron(normal(1, 4, 4), normal(2, 6, 8)) + jnp.kron(normal(3, 4, 4), normal(4, 6, 8))
    assert quant.Soka(energy=1.0).adapt(two, KEY).u.shape[0] in (2, 3)
    with pytest.raises(ConfigError, match="give a rank under jax.jit"):
        jax.jit(lambda w: quant.Soka().adapt(w, KEY))(two)


def test_merge_and_unmerge_are_exact():
    tree = {"embedding": normal(1, 40, K), "norm": jnp.ones(K)}
    tree |= {name: normal(i, K, N) for i, name in enumerate((*KINDS, "whole"))}
    tree["int8"] = quant.Int8().quantize(normal(9, K, N))
    rules = [*KINDS.items(), ("int8", quant.Lora(2))]
    params = quant.map_leaves(
        lambda _, leaf: moved(leaf) if quant.is_adapter(leaf) else leaf, quant.adapt(tree, rules, KEY)
    )
    merged, alone = quant.merge(params), quant.adapters(params)
    assert all(isinstance(leaf, jax.Array) for _, leaf in quant.leaves(merged))
    assert merged["whole"] is tree["whole"] and set(alone) == {*KINDS, "int8"}
    for name in KINDS:
        np.testing.assert_array_equal(merged[name], ops.materialize(params[name]))
    back = quant.unmerge(merged, alone, base=tree)
    for name in alone:
        assert back[name].base is tree[name]  # the very same leaf, quantized or not
        np.testing.assert_array_equal(ops.materialize(back[name]), merged[name])
    with pytest.raises(InputError, match="do not make up the merged weight"):
        quant.unmerge(merged, alone, base=tree | {"paca": tree["paca"] + 1e-6})
    with pytest.raises(InputError, match="depends on its base: pass base="):
        quant.unmerge(merged, {"hydra": alone["hydra"]})
    for name in ("lora", "paca", "soka"):  # without the base: one rounding
        near = quant.unmerge(merged, {name: alone[name]})[name].base
        np.testing.assert_allclose(near, tree[name], atol=1e-5)


def test_only_what_is_trained_goes_to_the_optimiser():
    tree = {"layers_0": {"q": normal(1, K, N), "k": normal(2, K, N)}, "norm": jnp.ones(K)}
    for spec, size in ((KINDS["lora"], 4 * (K + N)), (KINDS["paca"], 4 * N), (KINDS["hydra"], 4 * (K + 3 * N))):
        trained, frozen = quant.split(quant.adapt(tree, [(".*/q", spec)], KEY))
        assert sum(a.size for a in jax.tree.leaves(trained)) == size
        assert frozen["layers_0"]["q"].base is tree["layers_0"]["q"]
        assert all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(trained))
        whole = quant.join(trained, frozen)
        assert jax.tree.structure(whole) == jax.tree.structure(quant.attach(tree, quant.adapters(whole)))
    with pytest.raises(InputError, match="params without an adapter"):
        quant.split(tree)


def test_rules_are_ordered_and_starts_depend_on_the_path_alone():
    tree = {"layers_0": {"q": normal(1, K, N), "k": normal(2, K, N), "v": normal(3, K, N)}}
    rules = [(".*/v", None), (".*/q", quant.Paca(2)), (".*", quant.Lora(2, alpha=4, rslora=True))]
    layer = quant.adapt(tree, rules, KEY)["layers_0"]
    kinds = [type(layer[name]).__name__ for name in "qkv"]
    assert kinds == ["PacaArray", "LoraArray", "ArrayImpl"]
    assert layer["k"].scale == 4 / 2**0.5
    assert len(set(np.asarray(layer["q"].index).tolist())) == 2  # without replacement
    alone = quant.adapt(tree, [(".*/q", quant.Paca(2))], KEY)["layers_0"]["q"]
    np.testing.assert_array_equal(alone.index, layer["q"].index)


def test_every_kind_is_saved_and_names_its_axes(fresh):
    params = {name: moved(fresh[name, "int4"]) for name in KINDS}
    for tree in (params, quant.adapters(params)):
        arrays, manifest = quant.flatten(tree)
        back = quant.unflatten(arrays, json.loads(json.dumps(manifest)))
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
    axes = {name: quant.map_axes(leaf, ("embed", "mlp")) for name, leaf in params.items()}
    assert axes["paca"].delta == (None, "mlp") and axes["paca"].index == (None,)
    assert axes["soka"].u == (None, None, None)
    assert axes["hydra"].c == ("mlp", None) and axes["hydra"].d == (None, "mlp") and axes["hydra"].a == ("embed", None)
    for leaf in params.values():
        name = leaf.TRAINED[0]
        broken = dataclasses.replace(leaf, **{name: getattr(leaf, name)[..., :-1, :-1]})
        with pytest.raises(InputError):
            broken.check()


@pytest.mark.parametrize(
    "rules,error,words",
    [
        ([("q", quant.Lora(25))], ConfigError, "rank 25 is above the 24 of the shorter side .* at q"),
        ([("q", quant.Paca(25))], ConfigError, "rank 25 is above the 24 inputs"),
        ([("q", quant.Soka(17))], ConfigError, "rank 17 is above the 16 Kronecker terms"),
        ([("q", quant.Hydra(25))], ConfigError, "rank 25 is above"),
        ([("embedding", quant.Paca(2))], ConfigError, "embedding table .* accepted: kernels"),
        ([("embedding", quant.Hydra(2))], ConfigError, "embedding table .* accepted: kernels"),
        ([("p", quant.Lora(2))], InputError, "matches no whole path of a matrix; nearest paths: q"),
        ([("q", quant.Int8())], ConfigError, r"a spec such as quant.Lora\(\) is needed"),
        ([("q", quant.Lora)], ConfigError, r"did you mean Lora\(\)"),
        (["q"], ConfigError, "a rule is a pair"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(rules, error, words):
    with pytest.raises(error, match=words):
        quant.adapt({"q": normal(1, K, N), "embedding": normal(2, 40, K)}, rules, KEY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: quant.Lora(0), lambda: quant.Lora(2, alpha=-1), lambda: quant.Lora(2, alpha=float("inf")),
        lambda: quant.Paca(True), lambda: quant.Soka(1.5), lambda: quant.Soka(energy=0), lambda: quant.Soka(max_rank=0),
        lambda: quant.Hydra(2, alpha="8"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="rank|alpha|energy"):
        make()
