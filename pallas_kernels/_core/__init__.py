"""What every kernel shares: errors, argument checks, dispatch between forms, targets, tuning tables.

Stability: internal.
"""
