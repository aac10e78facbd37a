"""Names of models: directories, packaged models, the local Hub cache, and errors that say what to do."""

import builtins
import importlib

import pytest

from jaxinfer.checkpoint import hub
from jaxinfer.errors import CheckpointError, InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache; the network is not touched by any test."""
    pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, repository, *files):
    root = cache / ("models--" + repository.replace("/", "--"))
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


def test_a_directory_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_packaged_model_is_found_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "assets" / "tinycode").mkdir(parents=True)
    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="'tinycode' is not in this installation"):
        hub.resolve("tinycode")
    (tmp_path / "assets" / "tinycode" / "config.json").write_text("{}")
    assert hub.resolve("tinycode") == tmp_path / "assets" / "tinycode"


def test_a_cached_repository_is_found_without_the_network(cache):
    snapshot = put(cache, "Qwen/Qwen3-0.6B", "config.json", "model.safetensors")
    assert hub.resolve("Qwen/Qwen3-0.6B") == snapshot


def test_what_is_not_cached_is_answered_with_the_command_that_fetches_it(cache):
    with pytest.raises(CheckpointError, match="neither a directory here nor .* run: hf download Qwen/Qwen3-0.6B$"):
        hub.resolve("Qwen/Qwen3-0.6B")
    with pytest.raises(CheckpointError, match="run: hf download a/b --revision v2$"):
        hub.resolve("a/b", revision="v2")
    with pytest.raises(CheckpointError, match="cannot be reached.*run: hf download a/b"):
        hub.resolve("a/b", download=True)
    put(cache, "a/b", "README.md")
    with pytest.raises(CheckpointError, match="holds no config.json.*hf download a/b"):
        hub.resolve("a/b")


def test_without_huggingface_hub_the_error_says_how_to_get_both(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub && hf download a/b"):
        hub.resolve("a/b")


def test_a_path_that_is_not_there_is_told_with_what_is(tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "file.gguf").write_text("")
    with pytest.raises(CheckpointError, match="no such directory.*exists and holds llama"):
        hub.resolve(tmp_path / "lama")
    with pytest.raises(CheckpointError, match="a file; give the directory"):
        hub.resolve(tmp_path / "file.gguf")
    for name in ("", "a\0b"):
        with pytest.raises(InputError, match="is no model"):
            hub.resolve(name)
