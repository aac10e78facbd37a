"""Rows of the catalogue: meshes, strategies, pipelines, overlap, weights larger than memory.

Stability: internal.
"""

from jaxinfer.catalogue.entry import Method

METHODS: tuple[Method, ...] = ()
