"""Batch inference over files: rows, readers, a job directory that survives kills, a driver that keeps slots full.

Stability: experimental.
"""
