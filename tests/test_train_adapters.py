"""The adapter recipe: only adapters move, every kind learns and resumes to the bit, and the command writes a folder."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.train import adapters, data, lm, loop

STEP = Step(ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_length=64,
    tie_embeddings=True,
))  # fmt: skip
KEY = jax.random.key(0)
KINDS = {"lora": quant.Lora(4), "paca": quant.Paca(4), "soka": quant.Soka(), "hydra": quant.Hydra(4)}
STEPS = 6
# Compiling dominates these tests: LLVM's optimisations are left out where bits are no claim.


def adapted(kind):
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), jax.eval_shape(STEP.init, KEY)
    )
    if kind == "lora":  # over a quantized base
        params = quant.apply(params, [(".*/attention/.*", quant.Int8())])
    return quant.adapt(params, [(adapters.PROJECTIONS, KINDS[kind])], KEY)


def batch(step):
    windows = np.random.default_rng((5, step)).integers(2, 40, (4, 17))
    return data.pack(windows.astype(np.uint16))


def make(kind, source=batch, **changes):
    params = adapted(kind)
    recipe = adapters.recipe(
        params, source, steps=STEPS, objective=lm.NextToken(STEP), rate=1e-2, identity={"kind": kind}, **changes
    )
    return params, recipe, adapters.init_state(params, recipe, jax.random.key(1))


def digest(state):
    state = state.replace(key=jax.random.key_data(state.key))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


CONFIG = loop.LoopConfig(steps=STEPS, save_every=2, curve=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_move(kind):
    params, recipe, state = make(kind)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == shapes  # nothing for the frozen
    step = jax.jit(loop.make_train_step(recipe), donate_argnums=0)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch(0), recipe.frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.01, losses
    ended = quant.leaves(adapters.finished(state, recipe))
    for (path, before), (_, after) in zip(quant.leaves(params), ended, strict=True):
        if not quant.is_adapter(before):
            assert after is before, path
            continue
        assert after.base is before.base, path
        assert all((getattr(after, n) != getattr(before, n)).any() for n in before.TRAINED), path


@pytest.mark.slow
def test_a_run_killed_with_sigkill_goes_on_to_the_same_bits(tmp_path):
    """Of SoKA, whose start and rank are computed anew from the base."""
    _, recipe, state = make("soka")
    whole = digest(loop.train(recipe, state, CONFIG, tmp_path / "whole"))
    script = textwrap.dedent("""
        import importlib.util, os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_default_matmul_precision", "highest")
        spec = importlib.util.spec_from_file_location("here", sys.argv[1])
        here = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(here)
        def source(step):
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return here.batch(step)
        _, recipe, state = here.make("soka", source)
        here.loop.train(recipe, state, here.CONFIG, sys.argv[2])
    """)
    command = [sys.executable, "-c", script, __file__, str(tmp_path / "cut")]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert loop.Checkpoints(tmp_path / "cut" / "checkpoints").latest() == 4
    shutil.copytree(tmp_path / "cut", tmp_path / "wrong")
    _, recipe, state = make("soka")
    assert digest(loop.train(recipe, state, CONFIG, tmp_path / "cut")) == whole
    _, wrong, state = make("soka", lambda step: batch(step - 4))  # the planted bug: data that starts again
    assert digest(loop.train(wrong, state, CONFIG, tmp_path / "wrong")) != whole


def test_another_base_is_another_run(tmp_path):
    _, recipe, state = make("paca")
    loop.Checkpoints(tmp_path / "checkpoints", identity=recipe.identity).save(state)
    params = adapted("paca")
    params["embedding"] = params["embedding"] + 1
    options = {"steps": STEPS, "objective": lm.NextToken(STEP), "identity": {"kind": "paca"}}
    other = adapters.recipe(params, batch, rate=1e-2, **options)
    with pytest.raises(ConfigError, match="is of another run .frozen: saved"):
        loop.train(other, adapters.init_state(params, other, KEY), CONFIG, tmp_path)
    with pytest.raises(ConfigError, match="rate must be positive"):
        adapters.recipe(params, batch, rate=0, **options)


@pytest.mark.slow
def test_the_command_trains_and_writes_what_loads(tiny_model, tmp_path, capsys):
    from jaxinfer.cli.app import run
    from jaxinfer.models.adapters import load_adapter
    from jaxinfer.models.hf import load_directory

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 8}) + "\n" for i in range(20)))
    command = ["train", "adapter", "--kind", "lora:alpha=4", "--rank", "2", "--target", str(tiny_model), "--data"]
    command += [str(text), "--output", str(tmp_path / "out"), "--steps", "4", "--batch-tokens", "64", "--length", "32"]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trained"] == 2 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + 64))
    assert {"adapter_config.json", "adapter_model.safetensors", "train"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    config, params = load_directory(tiny_model, dtype="float32")
    q = load_adapter(config, params, tmp_path / "out")["layers_0"]["attention"]["q"]
    assert q.scale == 2.0 and q.b.any()
    answer = ["generate", "--model", str(tiny_model), "--prompt", "def", "--max-tokens", "3", "--adapter"]
    assert run([*answer, str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]
    assert run([*answer, str(tmp_path)]) != 0 and "a folder with adapter_config.json" in capsys.readouterr().err
    assert run([*command, "--kind", "dora"]) != 0 and "accepted: lora, paca, soka, hydra" in capsys.readouterr().err
    assert run([*command, "--kind", "lora:rank=3"]) != 0 and "the rank once" in capsys.readouterr().err
    assert run([*command, "--match", "nothing"]) != 0 and "nearest paths" in capsys.readouterr().err
    assert run([*command, "--rank", "17"]) != 0 and "rank 17 is above the 16" in capsys.readouterr().err
