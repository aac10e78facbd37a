"""Models as functional Linen modules, configured from Hugging Face `config.json` files.

Stability: experimental.
"""

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Output
from jaxinfer.models.step import AutoCache, Step

__all__ = ["AutoCache", "ModelConfig", "Output", "Step"]
