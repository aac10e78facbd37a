"""The command line: `jaxinfer generate`, `compare`, `info`, `methods`, `doctor`. Here everything meets.

Every command imports what it needs when it runs, so that `--help` is quick.

Stability: experimental.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and give back its exit code: `codes.py` says what each means."""
    from jaxinfer.cli.app import run

    return run(arguments)
