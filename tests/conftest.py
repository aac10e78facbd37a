"""What every test runs under: eight virtual CPU devices, full-precision products, a skip where something is lacking."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import compiling

# XLA_FLAGS from outside stand as they are: `.ci/run` runs the smoke tests with an empty one, as users compile.
os.environ.setdefault("XLA_FLAGS", compiling.FLAGS)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


def lacking(item: pytest.Item) -> str | None:
    """What a marked test needs and this machine does not have."""
    if item.get_closest_marker("parity"):
        for name in ("torch", "transformers"):
            if importlib.util.find_spec(name) is None:
                return f"{name} is not installed"
    for backend in ("gpu", "tpu"):
        if item.get_closest_marker(backend) and jax.default_backend() != backend:
            return f"no {backend.upper()}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := lacking(item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random one-layer Llama, with a byte-level tokenizer and a template."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model of `tiny_model`'s vocabulary: a poor draft, which must change no output."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-draft", seed=1)


def write_tiny_model(directory: Path, *, seed: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from jaxinfer.models import ModelConfig
    from jaxinfer.models.hf import save_directory
    from jaxinfer.models.step import Step

    config = ModelConfig(
        vocab_size=400, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64,
        max_length=512, eos=(0,),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: (rng.normal(0, 0.3, x.shape) if len(x.shape) > 1 else np.ones(x.shape)).astype(np.float32),
        jax.eval_shape(Step(config).init, jax.random.key(0)),
    )
    save_directory(config, params, directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(Path(__file__).parent.parent / "LICENSE")], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
