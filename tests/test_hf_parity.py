"""Every family against transformers itself, in both directions of the checkpoint round trip."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models import Step
from jaxinfer.models.hf import load_directory, save_directory

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
HERE = Path(__file__).parent
make = runpy.run_path(str(HERE / "goldens" / "make.py"))
goldens = runpy.run_path(str(HERE / "test_hf_goldens.py"))
TOTAL, TOLERANCE = make["TOTAL"], 1e-4


def real(logits: np.ndarray) -> np.ndarray:
    """The logits of every position that a row has."""
    return np.concatenate([row[: p + make["STEPS"]] for row, p in zip(logits, make["PROMPTS"], strict=True)])


@pytest.mark.parametrize("name", sorted(make["CASES"]))
def test_loads_what_transformers_saved_and_transformers_loads_what_we_save(name, tmp_path):
    theirs = make["torch_model"]({**make["BASE"], **make["CASES"][name]}, tmp_path / "theirs")
    config, params = load_directory(tmp_path / "theirs", max_length=TOTAL)
    step, ids = Step(config), make["tokens"](config.vocab_size)
    expected = make["torch_logits"](theirs, ids)
    for run in (goldens["whole"], goldens["cached"]):
        logits = np.asarray(run(step, params, jnp.asarray(ids)))
        assert np.abs(real(logits) - real(expected)).max() < TOLERANCE, run.__name__

    # Saved with its own max_length: `max_length=TOTAL` above is a choice of this process.
    saved, _ = load_directory(tmp_path / "theirs")
    save_directory(saved, params, tmp_path / "ours", max_shard_size=20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    again = make["torch_logits"](make["reload"](tmp_path / "ours"), ids)
    np.testing.assert_array_equal(again, expected)
    config2, params2 = load_directory(tmp_path / "ours", max_length=TOTAL)
    assert config2 == config
    jax.tree.map(np.testing.assert_array_equal, params, params2)


def test_a_golden_is_what_transformers_computes_today(tmp_path):
    name = "qwen3-moe"
    model = make["torch_model"]({**make["BASE"], **make["CASES"][name]}, tmp_path)
    logits = make["checked"](make["torch_logits"](model, make["tokens"](96)))
    np.testing.assert_allclose(logits, np.load(HERE / "goldens" / f"{name}.npz")["logits"], atol=1e-5)
    written = json.loads((tmp_path / "config.json").read_text())
    golden = json.loads((HERE / "goldens" / f"{name}.json").read_text())
    assert {k: v for k, v in written.items() if k != "transformers_version"} == {
        k: v for k, v in golden.items() if k != "transformers_version"
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_files_round_trip_bitwise(dtype, tmp_path):
    import torch
    import transformers

    make["torch_model"]({**make["BASE"], **make["CASES"]["qwen2"]}, tmp_path / "f32")
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=kind)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_directory(tmp_path / "theirs", dtype="stored")
    assert params["embedding"].dtype == dtype
    save_directory(config, params, tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == kind  # from config.json
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
