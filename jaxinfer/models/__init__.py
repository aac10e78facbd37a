"""Models as functional Linen modules, configured from Hugging Face `config.json` files.

Stability: experimental.
"""

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Output
from jaxinfer.models.families import FAMILIES, config_from_hf, config_to_hf
from jaxinfer.models.step import AutoCache, Step, WrappedStep

__all__ = ["FAMILIES", "AutoCache", "ModelConfig", "Output", "Step", "WrappedStep", "config_from_hf", "config_to_hf"]
