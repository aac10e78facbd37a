"""Every family against logits of transformers: whole sequences, and a ragged prefill with 32 cached steps."""

import functools
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer.checkpoint.safetensors_save import Entry, save
from jaxinfer.models import Step
from jaxinfer.models.hf import _abstract, load_config, load_directory
from jaxinfer.models.hf_names import places

pytestmark = pytest.mark.smoke

GOLDENS = Path(__file__).parent / "goldens"
make = runpy.run_path(str(GOLDENS / "make.py"))
PROMPTS, STEPS, TOTAL = make["PROMPTS"], make["STEPS"], make["TOTAL"]
TOLERANCE = 1e-4
CASES = sorted(make["CASES"])


def write_checkpoint(config_json: dict, directory: Path) -> None:
    """The checkpoint that the goldens were computed with: names from our table, weights from the names."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json))
    config = load_config(directory)
    shapes = {path: leaf.shape for path, leaf in _abstract(config).items()}
    stored = {name: row.stored for row in places(config, shapes) for name in row.names}
    entries = [
        Entry(name, shape, np.dtype(np.float32), functools.partial(make["tensor"], name, shape))
        for name, shape in stored.items()
    ]
    save(directory, entries)


CHUNK = 8
# Compile quickly: the programs are tiny and run once. What is computed stays the same.
jit = functools.partial(jax.jit, static_argnames="step")


@jit
def whole(step: Step, params, tokens):
    """Logits [B, T, V] of whole rows without a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return step.head(params, step(params, tokens, positions)[0].hidden)


@jit
def cached(step: Step, params, tokens):
    """The same logits by a ragged prefill in chunks and STEPS steps of one token; zero where a row has none."""
    lengths = jnp.asarray(PROMPTS, jnp.int32)
    batch = jnp.arange(len(PROMPTS))[:, None]

    def one(carry, most):
        cache, logits = carry
        at = cache.t[:, None] + jnp.arange(CHUNK, dtype=jnp.int32)
        n = jnp.where(most > 1, jnp.clip(lengths - cache.t, 0, most), 1)
        positions = jnp.where(jnp.arange(CHUNK) < n[:, None], at, -1)
        output, block = step(params, jnp.take_along_axis(tokens, at, 1, mode="clip"), positions, cache)
        path = jnp.broadcast_to(jnp.arange(CHUNK, dtype=jnp.int32), at.shape)
        cache = kv.commit(cache, block, path, n, output.notes)
        kept = jnp.where(positions >= 0, at, TOTAL)
        return (cache, logits.at[batch, kept].set(step.head(params, output.hidden), mode="drop")), None

    start = step.new_cache(len(PROMPTS), TOTAL), jnp.zeros((*tokens.shape, step.vocab_size))
    most = jnp.asarray([CHUNK] * -(-max(PROMPTS) // CHUNK) + [1] * STEPS)
    (_, logits), _ = jax.lax.scan(one, start, most)
    return logits


def load(name: str, directory: Path):
    """(step, params, tokens, golden logits) of a case."""
    write_checkpoint(json.loads((GOLDENS / f"{name}.json").read_text()), directory)
    config, params = load_directory(directory, max_length=TOTAL)
    golden = np.load(GOLDENS / f"{name}.npz")["logits"]
    assert golden.std() > 0.5
    return Step(config), params, jnp.asarray(make["tokens"](config.vocab_size)), golden


@pytest.mark.parametrize("name", CASES)
def test_ragged_prefill_and_cached_steps_equal_transformers(name, tmp_path):
    step, params, tokens, golden = load(name, tmp_path)
    logits = np.asarray(cached(step, params, tokens))
    np.testing.assert_allclose(make["checked"](logits), golden, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "phi3-longrope"])
def test_whole_sequences_equal_transformers(name, tmp_path):
    step, params, tokens, golden = load(name, tmp_path)
    logits = np.asarray(whole(step, params, tokens))
    np.testing.assert_allclose(make["checked"](logits), golden, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral-window", {"sliding_window": 9}),
        ("llama3.1-llama3rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ],
)
def test_a_wrong_config_is_told_from_the_right_one(name, change, tmp_path):
    """Negative control: what a golden is there to catch moves its logits by more than the tolerance."""
    write_checkpoint(json.loads((GOLDENS / f"{name}.json").read_text()) | change, tmp_path)
    config, params = load_directory(tmp_path, max_length=TOTAL)
    golden = np.load(GOLDENS / f"{name}.npz")["logits"]
    logits = whole(Step(config), params, jnp.asarray(make["tokens"](config.vocab_size)))
    assert np.abs(make["checked"](np.asarray(logits)) - golden).max() > 100 * TOLERANCE
