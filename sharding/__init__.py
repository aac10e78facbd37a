"""Meshes, tables from logical to mesh axes, and the programs that need more than annotations.

Stability: experimental.
"""
