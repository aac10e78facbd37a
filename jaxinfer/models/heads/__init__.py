"""Draft heads: small trained parts that guess a frozen target's next tokens from what it computed anyway.

Stability: experimental.
"""

from jaxinfer.models.heads.base import HEADS, Head, TargetShape, head_class
from jaxinfer.models.heads.files import LoadedHead, holds_head, load_head, save_head

__all__ = ["HEADS", "Head", "LoadedHead", "TargetShape", "head_class", "holds_head", "load_head", "save_head"]
