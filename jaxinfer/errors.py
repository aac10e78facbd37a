"""Exceptions that jaxinfer raises on purpose; each message names the thing, what it got and what it accepts.

Stability: stable.
"""


class JaxinferError(Exception):
    """Base of every error that jaxinfer raises on purpose."""


class InputError(JaxinferError, ValueError):
    """An argument, a request or a row that cannot be served as given."""


class ConfigError(JaxinferError, ValueError):
    """A configuration that is unknown, contradicts itself, or asks for what is not supported."""


class CheckpointError(JaxinferError):
    """A checkpoint directory or file that is missing, damaged, or does not match its configuration."""


class JobError(JaxinferError):
    """A batch job that cannot start or go on."""
