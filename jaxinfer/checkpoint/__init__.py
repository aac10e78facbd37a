"""Checkpoints: safetensors files, names that resolve to directories, tokenizers and chat templates.

Nothing here is ever unpickled and nothing is fetched unless the caller asks for it. The tables that map the tensor
names of each model family to our params live beside the models, in `jaxinfer.models.hf`.

Stability: experimental.
"""
