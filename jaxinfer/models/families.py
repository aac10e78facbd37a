"""Families of decoder models: what a Hugging Face `config.json` says, as a `ModelConfig`, and back.

Adding a family is a row in `FAMILIES` plus, where its config differs from Llama's, a small `read` function.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ACTIVATIONS, ModelConfig
from jaxinfer.models.rope_config import check_rotations, legacy, read_rope, same_rotation, write_rope
from jaxinfer.ops.position import Rope

Hf = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table: the class name in `architectures` and how its config differs from Llama's."""

    architecture: str
    read: Callable[[Hf], dict[str, Any]] = lambda hf: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


def config_from_hf(hf: Hf, *, max_length: int | None = None) -> ModelConfig:
    """A ModelConfig from the contents of a `config.json`.

    `max_length` overrides the longest position range to serve (default `max_position_embeddings`); dynamic and
    longrope scalings fix their frequencies by it. Raises ConfigError for anything unknown or contradictory.
    """
    if not isinstance(hf, Mapping):
        raise ConfigError(f"config.json must hold an object, got {type(hf).__name__}")
    kind = hf.get("model_type")
    if kind == "jaxinfer":
        config = _read_own(hf)  # a learned table of positions is as long as it is
        fixed = max_length is None or config.position == "learned"
        return config if fixed else dataclasses.replace(config, max_length=max_length)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"model_type {kind!r} is not supported; supported: {', '.join((*FAMILIES, 'jaxinfer'))}")
    if hf.get("quantization_config"):
        raise ConfigError("quantization_config: pre-quantized checkpoints are not supported; load the original weights")
    fields = _common(hf, kind)
    fields |= FAMILIES[kind].read(hf)
    layers = fields["num_layers"]
    if "windows" not in fields:
        fields["windows"] = (fields.pop("window", None),) * layers
    if "ropes" not in fields:
        fields["ropes"] = (read_rope(hf, fields["head_dim"]),) * layers
    if max_length is not None:
        fields["max_length"] = max_length
    config = ModelConfig(**fields)
    check_rotations(config)
    return config


def _common(hf: Hf, kind: str) -> dict[str, Any]:
    heads, hidden = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
    groups = integer(hf, "num_key_value_heads", heads)
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    dim = integer(hf, "head_dim", hidden // heads if heads else 0)
    eos = hf.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) for token in [*eos, hf.get("bos_token_id") or 0]):
        raise ConfigError(f"eos_token_id and bos_token_id must be token ids, got {eos!r}, {hf.get('bos_token_id')!r}")
    epsilon = hf.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, float | int) or not 0 <= epsilon < 1:
        raise ConfigError(f"rms_norm_eps must be a small number, got {epsilon!r}")
    return {
        "family": kind,
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": integer(hf, "num_hidden_layers", limit=1000),
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": dim,
        "mlp_size": integer(hf, "intermediate_size"),
        "max_length": integer(hf, "max_position_embeddings", 2048),
        "activation": activation,
        "norm_eps": float(epsilon),
        "tie_embeddings": flag(hf, "tie_word_embeddings", kind.startswith("gemma")),
        "bos": hf.get("bos_token_id"),
        "eos": tuple(eos),
    }


def integer(hf: Hf, name: str, default: int | None = None, *, limit: int = 2**31 - 1) -> int:
    """A positive integer entry; a missing or null one takes the default, or raises when there is none."""
    value = hf.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        raise ConfigError(f"{name} must be an integer from 1 to {limit}, got {value!r}")
    return value


def flag(hf: Hf, name: str, default: bool = False) -> bool:
    """A boolean entry."""
    value = hf.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def number(hf: Hf, name: str) -> float | None:
    """An optional positive number."""
    value = hf.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number or null, got {value!r}")
    return float(value)


def layer_types(hf: Hf, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """For each layer, whether it slides: from `layer_types`, else by `default(layer)`."""
    layers, types = integer(hf, "num_hidden_layers", limit=1000), hf.get("layer_types")
    if types is None:
        return tuple(default(i) for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise ConfigError(f"layer_types must list {layers} of {known}, got {types!r}")
    return tuple(t == "sliding_attention" for t in types)


def _windows(hf: Hf, slides: tuple[bool, ...]) -> tuple[int | None, ...]:
    window = None if hf.get("sliding_window") is None else integer(hf, "sliding_window")
    return tuple(window if slide else None for slide in slides)


def _llama(hf: Hf) -> dict[str, Any]:
    bias = flag(hf, "attention_bias")
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": flag(hf, "mlp_bias")}


def _sliding(hf: Hf) -> dict[str, Any]:
    return {"windows": _windows(hf, layer_types(hf, lambda i: True))}


def _qwen_windows(hf: Hf) -> dict[str, Any]:
    first = hf.get("max_window_layers")
    first = first if isinstance(first, int) else 0
    used = flag(hf, "use_sliding_window")
    return {"windows": _windows(hf, layer_types(hf, lambda i: used and i >= first))}


def _qwen2(hf: Hf) -> dict[str, Any]:
    return _qwen_windows(hf) | {"qkv_bias": True}


def _qwen3(hf: Hf) -> dict[str, Any]:
    bias = flag(hf, "attention_bias")
    head_dim = {"head_dim": integer(hf, "head_dim", 128)}
    return _qwen_windows(hf) | head_dim | {"qk_norm": True, "qkv_bias": bias, "output_bias": bias}


def _qwen3_moe(hf: Hf) -> dict[str, Any]:
    sparse_step, layers = integer(hf, "decoder_sparse_step", 1), integer(hf, "num_hidden_layers", limit=1000)
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers must be a list of layers, got {dense!r}")
    experts = "num_experts" if hf.get("num_experts") is not None else "num_local_experts"
    return _qwen3(hf) | {
        "head_dim": integer(hf, "head_dim", integer(hf, "hidden_size") // integer(hf, "num_attention_heads")),
        "num_experts": integer(hf, experts),
        "experts_per_token": integer(hf, "num_experts_per_tok"),
        "expert_size": integer(hf, "moe_intermediate_size"),
        "normalize_experts": flag(hf, "norm_topk_prob"),
        "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % sparse_step),
    }


def _mixtral(hf: Hf) -> dict[str, Any]:
    return _sliding(hf) | {
        "num_experts": integer(hf, "num_local_experts"),
        "experts_per_token": integer(hf, "num_experts_per_tok"),
        "expert_size": integer(hf, "intermediate_size"),
    }


def _gemma(hf: Hf) -> dict[str, Any]:
    head_dim = integer(hf, "head_dim", 256)
    bias = flag(hf, "attention_bias")
    return {
        "head_dim": head_dim,
        "activation": hf.get("hidden_activation") or "gelu_pytorch_tanh",
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": math.sqrt(integer(hf, "hidden_size")),
        "attention_scale": (number(hf, "query_pre_attn_scalar") or head_dim) ** -0.5,
        "attention_softcap": number(hf, "attn_logit_softcapping"),
        "final_softcap": number(hf, "final_logit_softcapping"),
        "qkv_bias": bias,
        "output_bias": bias,
    }


def _gemma2(hf: Hf) -> dict[str, Any]:
    return _gemma(hf) | {"windows": _windows(hf, layer_types(hf, lambda i: i % 2 == 0))}


def _gemma3(hf: Hf) -> dict[str, Any]:
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    slides = layer_types(hf, lambda i: bool((i + 1) % pattern))
    fields = _gemma(hf) | {"qk_norm": True, "windows": _windows(hf, slides)}
    kinds = {True: "sliding_attention", False: "full_attention"}
    local = hf if "rope_parameters" in hf else {"rope_local_base_freq": 10000.0, "rope_theta": 1e6, **hf}
    fields["ropes"] = tuple(read_rope(local, fields["head_dim"], layer_type=kinds[slide]) for slide in slides)
    return fields


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, lambda c: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}),
    "mistral": Family("MistralForCausalLM", _sliding),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, lambda c: {"attention_bias": c.qkv_bias}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, lambda c: {"attention_bias": c.qkv_bias}),
    "mixtral": Family("MixtralForCausalLM", _mixtral),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, lambda c: {"attention_bias": c.qkv_bias}),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, lambda c: {"attention_bias": c.qkv_bias}),
    "phi3": Family("Phi3ForCausalLM", _sliding),
}


def config_to_hf(config: ModelConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The `config.json` of a ModelConfig, readable by transformers where the family exists there.

    A position encoding other than RoPE exists in no family: such a model is saved as `model_type: jaxinfer`.
    """
    if config.family not in FAMILIES or config.position != "rope":
        return _write_own(config, dtype)
    c = config
    hf: dict[str, Any] = {
        "architectures": [FAMILIES[c.family].architecture],
        "model_type": c.family,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_size,
        "max_position_embeddings": c.max_length,
        "hidden_act": c.activation,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos,
        "eos_token_id": c.eos[0] if len(c.eos) == 1 else list(c.eos) or None,
        "pad_token_id": None,  # left out, Phi-3's class takes 32000 and refuses smaller vocabularies
    }
    hf |= _write_positions(c) | _write_windows(c) | FAMILIES[c.family].write(c)
    if c.family.startswith("gemma"):
        hf |= {
            "hidden_activation": c.activation,
            "query_pre_attn_scalar": _whole((c.attention_scale or c.head_dim**-0.5) ** -2),
            "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.final_softcap,
        }
    if c.num_experts:
        hf |= {"num_experts_per_tok": c.experts_per_token, "num_local_experts": c.num_experts}
        if c.family == "qwen3_moe":
            hf |= {"num_experts": c.num_experts, "moe_intermediate_size": c.expert_size, "decoder_sparse_step": 1}
            hf |= {"mlp_only_layers": list(c.dense_layers), "norm_topk_prob": c.normalize_experts}
    return hf


def _whole(x: float) -> int | float:
    """`x` as transformers 5 wants it: an integer where it is one but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _write_positions(c: ModelConfig) -> dict[str, Any]:
    ropes = c.ropes or (Rope(c.head_dim),) * c.num_layers
    if same_rotation(ropes):
        rope = ropes[0]
        if rope is None:
            raise ConfigError("a family of Hugging Face always rotates; use position='none'")
        out = {"rope_parameters": write_rope(rope, c.head_dim), **legacy(rope, c.head_dim)}
        if rope.scaling == "longrope":
            out["original_max_position_embeddings"] = rope.original_length
        return out
    kinds = {bool(window): rope for window, rope in zip(c.windows, ropes, strict=True) if rope}
    out = {}
    if False in kinds:
        out = legacy(kinds[False], c.head_dim)
    parameters = {"sliding_attention": kinds[True], "full_attention": kinds.get(False, kinds[True])}
    out["rope_parameters"] = {name: write_rope(rope, c.head_dim) for name, rope in parameters.items()}
    return out | {"rope_local_base_freq": kinds[True].theta}


def _write_windows(c: ModelConfig) -> dict[str, Any]:
    sizes = {window for window in c.windows if window}
    if len(sizes) > 1:
        raise ConfigError(f"a Hugging Face config has one sliding_window, this model has {sorted(sizes)}")
    window = sizes.pop() if sizes else None
    out: dict[str, Any] = {"sliding_window": window}
    if c.family.startswith(("qwen", "gemma")):
        out["layer_types"] = [
            "sliding_attention" if w else "full_attention" for w in c.windows or (None,) * c.num_layers
        ]
    if c.family.startswith("qwen"):
        out |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    return out


def _write_own(config: ModelConfig, dtype: str) -> dict[str, Any]:
    return {"model_type": "jaxinfer", "architectures": ["JaxinferForCausalLM"], "dtype": dtype} | dataclasses.asdict(
        config
    )


def _read_own(hf: Hf) -> ModelConfig:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    fields = {name: value for name, value in hf.items() if name in names}
    unknown = set(hf) - names - {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}
    if unknown:
        raise ConfigError(f"config.json of model_type 'jaxinfer' has unknown keys {sorted(unknown)}")
    try:
        fields = _tuples(fields)
        fields["ropes"] = tuple(rope and Rope(**_tuples(rope)) for rope in fields.get("ropes", ()))
        _check_types(fields)
        config = ModelConfig(**fields)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"config.json of model_type 'jaxinfer': {error}") from error
    check_rotations(config)
    return config


def _check_types(fields: Mapping[str, Any]) -> None:
    plain = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": (type(None),)}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in fields:
            continue
        value, words = fields[field.name], str(field.type).split(" | ")
        if words[0].startswith("tuple"):
            fits = isinstance(value, tuple) and all(x is None or isinstance(x, int | Rope) for x in value)
        else:
            fits = isinstance(value, tuple(t for word in words for t in plain[word]))
            fits &= "bool" in words or not isinstance(value, bool)
            fits &= not isinstance(value, float) or math.isfinite(value)
        if not fits:
            raise ConfigError(f"config.json: {field.name} must be {field.type}, got {str(value)[:80]}")


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
