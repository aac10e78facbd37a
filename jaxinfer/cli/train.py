"""`jaxinfer train`: the training recipes, one command each.

A new one is a function in a file of its own, `train_<name>.py`, with the options of `training.py`; add it to COMMANDS.

Stability: experimental.
"""

import typer

from jaxinfer.cli import codes, training
from jaxinfer.cli.train_adapter import adapter
from jaxinfer.cli.train_draft import draft
from jaxinfer.cli.train_first import first
from jaxinfer.cli.train_flow import flow
from jaxinfer.cli.train_hamburger import hamburger
from jaxinfer.cli.train_heads import heads
from jaxinfer.cli.train_lm import lm
from jaxinfer.cli.train_long import long
from jaxinfer.cli.train_lud import lud
from jaxinfer.cli.train_rl import rl

HELP = """Train models that make others fast, and fine-tune: one loop, a recipe for each command.

A run that is killed goes on from its last checkpoint when the same command is given again, to the same bits.
"""

train = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, epilog=codes.HELP)

COMMANDS = {
    "lm": lm,
    "adapter": adapter,
    "draft": draft,
    "heads": heads,
    "long": long,
    "lud": lud,
    "first": first,
    "hamburger": hamburger,
    "rl": rl,
    "flow": flow,
}

for name, command in COMMANDS.items():
    train.command(name, epilog=codes.HELP)(training.guarded(command))
