"""What the `train` commands share: their options, how a run is started, and how its end becomes an exit code.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer import host_memory
from jaxinfer.cli import codes
from jaxinfer.errors import JaxinferError

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import LanguageModel
    from jaxinfer.train.loop import LoopConfig, Recipe, TrainState
    from jaxinfer.train.text import Text

Target = Annotated[
    str, typer.Option("--target", help="A checkpoint directory, a packaged model, or owner/name in the Hub cache.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="JSON Lines with a text field, a text file or a folder of sources. Default: the standard library's.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", help="Folder of the result, and of the checkpoints that the command goes on from.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Updates in all.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights, the order of the data and all draws.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the last checkpoint, or begin again.")]
SaveEvery = Annotated[
    int | None, typer.Option("--save-every", min=1, help="Updates between checkpoints. Default: every five minutes.")
]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", min=16, help="Tokens of an update.")]
Length = Annotated[int, typer.Option("--length", min=8, help="Tokens of a window; a batch holds several.")]


@dataclasses.dataclass(frozen=True)
class Run:
    """How long a command trains and where; the same for every recipe."""

    output: Path
    steps: int
    resume: bool = True
    save_every: int | None = None

    def config(self, **changes: Any) -> LoopConfig:
        """The loop's settings."""
        from jaxinfer.train.loop import LoopConfig

        return LoopConfig(**{"steps": self.steps, "save_every": self.save_every, **changes})

    def train(self, recipe: Recipe, state: TrainState, name: str = "train", **changes: Any) -> TrainState:
        """The recipe's run to its end, in the folder `name` below the output. `changes`: of the loop's settings.

        Several processes share the rows of every batch, over all their devices; each keeps all of the state.
        """
        import jax

        from jaxinfer.train import loop, processes

        if jax.process_count() > 1:
            recipe = dataclasses.replace(recipe, batch_sharding=processes.batch_axes(accumulate=recipe.accumulate))
        return loop.train(recipe, state, self.config(**changes), self.output / name, resume=self.resume)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A run that was stopped ends with the code that says so, and a machine that fails us with one line."""

    @functools.wraps(command)
    def run_it(**values: Any) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of what we tell in one line
        host_memory.keep_freed()
        try:
            command(**values)
        except KeyboardInterrupt:
            _end("interrupted", codes.INTERRUPTED)
        except OSError as error:  # a full disk, a folder that may not be written
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{where}{error.strerror or error}", codes.INTERNAL)
        except JaxinferError as error:
            from jaxinfer.train.loop import Preempted

            if isinstance(error, Preempted):
                _end(str(error), codes.RETRY)
            raise

    return run_it


def _end(text: str, code: int) -> None:
    typer.echo(f"jaxinfer: {text}", err=True)
    raise typer.Exit(code) from None


def check_writable(folder: Path) -> None:
    """Raise before hours of work where the result could not be written."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_bytes(b"")
    probe.unlink()


def counter(what: str) -> Callable[[int, int], None]:
    """Tells of (done, total), on a line of a terminal that is written over."""

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\r{what} {done}/{total} ", nl=done == total, err=True)

    return tell


def load_target(name: str) -> LanguageModel:
    """The model that a command trains from or for, with float32 weights. Compiled programs are kept from here on."""
    import jaxinfer
    from jaxinfer.cli import compiled

    compiled.use_cache()
    return jaxinfer.load(name, dtype="float32")


def load_text(data: Path | None, target: LanguageModel) -> Text:
    """The text of `--data` in the target's tokens."""
    from jaxinfer.train import text

    return text.load(data, target.tokenizer, vocab_size=target.step.vocab_size)


def export(target: LanguageModel, params: Any, folder: Path, *, step: Any = None) -> None:
    """Writes a trained model as a Hugging Face directory (bf16) with the target's tokenizer. `step`: the model that
    the params belong to, where it is not the target itself."""
    from jaxinfer.models.hf import save_directory

    config = (target.step if step is None else step).config
    save_directory(config, params, folder, dtype="bfloat16", tokenizer_from=target.directory)
