"""Write the goldens: for each family a tiny config.json and a few logits that transformers computed for it.

The weights are not stored: each tensor is a function of its name (`tensor`), so a golden is a few kilobytes, and a
wrong name in our tables gives wrong weights. Run where torch and transformers are installed; it takes about 20 s:

    python tests/goldens/make.py

The tests load this file for its functions; importing it needs numpy only.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROMPTS = (40, 23, 9)  # ragged; then 32 more tokens one at a time
STEPS = 32
TOTAL = max(PROMPTS) + STEPS
CHECKED = 24  # logits kept of each checked position

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.2, 2.0, 3.5, 6.0],
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# Sequences have 72 tokens: longer than every window (8) and more than twice every original length (16).
ONE = {"num_hidden_layers": 1}  # where the case is about positions: half the time to compile
CASES: dict[str, dict] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", **ONE, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1-llama3rope": {"model_type": "llama", **ONE, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama-linear-bias": {
        "model_type": "llama",
        **ONE,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-dynamic": {
        "model_type": "llama",
        **ONE,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 8, "head_dim": 12},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3-yarn": {"model_type": "qwen3", **ONE, "head_dim": 16, "rope_parameters": YARN},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": {
        "model_type": "gemma3_text",
        **GEMMA,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "phi3-longrope": {
        "model_type": "phi3",
        **ONE,
        "original_max_position_embeddings": 16,
        "rope_parameters": LONGROPE,
    },
    "mixtral": {"model_type": "mixtral", **ONE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of this name, float32: large enough that every part of the model matters."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        return (0.3 * noise + (0.0 if "bias" in name else 1.0)).astype(np.float32)
    scale = 0.4 if "embed" in name else 1.5 * shape[-1] ** -0.5
    return (scale * noise).astype(np.float32)


def tokens(vocab_size: int) -> np.ndarray:
    """i32[B, TOTAL]; row b uses its first PROMPTS[b] + STEPS."""
    return np.random.RandomState(7).randint(0, vocab_size, (len(PROMPTS), TOTAL)).astype(np.int32)


def checked(logits: np.ndarray) -> np.ndarray:
    """What a golden keeps of logits [B, TOTAL, V]: four positions a row from the prompt to the last step."""
    rows = [logits[b, [p - 1, p, p + STEPS // 2, p + STEPS - 1], :CHECKED] for b, p in enumerate(PROMPTS)]
    return np.stack(rows).astype(np.float32)


def torch_model(config: dict, directory: Path):
    """A transformers model of `config` with our weights, saved to and loaded from `directory` by transformers alone."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    kind = {**config}
    settings = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(directory)
    file = directory / "model.safetensors"
    shapes = {name: t.shape for name, t in load_file(file).items()}
    save_file({name: tensor(name, shape) for name, shape in shapes.items()}, file, metadata={"format": "pt"})
    return reload(directory)


def reload(directory: Path):
    """The model that transformers loads from a directory, in float32, with eager attention."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of whole rows: causal, so what pads a row on the right is not seen."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits.float().numpy()


def main() -> None:
    for name, case in CASES.items():
        config = {**BASE, **case}
        with tempfile.TemporaryDirectory() as directory:
            model = torch_model(config, Path(directory))
            written = json.loads((Path(directory) / "config.json").read_text())
            logits = torch_logits(model, tokens(config["vocab_size"]))
        (HERE / f"{name}.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
        np.savez_compressed(HERE / f"{name}.npz", logits=checked(logits))
        print(f"{name}: logits of standard deviation {logits.std():.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
