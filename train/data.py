"""The built-in corpus: the Python standard library's sources as training text, held-out text and packed batches.

The corpus needs no download: it is the `.py` files under `sysconfig.get_paths()["stdlib"]` of the running interpreter
(site-packages aside). `split` says which files train and which are held out; `train_tokenizer` makes the byte-pair
tokenizer; `Stream` cuts token streams into batches as a pure function of (seed, step).

Stability: experimental.
"""

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxinfer.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file: `name` is its path below the standard library's folder, with slashes."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`modules` and `tests` are training text, `held_out` is every tenth module; all sorted by name."""

    modules: tuple[Document, ...]
    tests: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def digest(self) -> str:
        """A short hash of every name and text: equal digests mean the same corpus."""
        h = hashlib.sha256()
        for part in (self.modules, self.tests, self.held_out):
            for document in part:
                h.update(f"{document.name}\0{document.text}\0".encode())
        return h.hexdigest()[:16]


def split(names: Sequence[str], *, every: int = 10) -> tuple[list[str], list[str], list[str]]:
    """File names -> (modules, tests, held out): a pure function of the set of names.

    A file below a folder named `test`, `tests` or `idle_test` is a test. The others are sorted by name, and number 0,
    `every`, 2 * `every`, ... of that list are held out.
    """
    is_test = {name: bool(TEST_FOLDERS & set(name.split("/")[:-1])) for name in names}
    others = sorted(name for name in names if not is_test[name])
    return [n for i, n in enumerate(others) if i % every], sorted(n for n in names if is_test[n]), others[::every]


def standard_library(root: str | Path | None = None) -> Corpus:
    """The corpus from the `.py` files below `root` (default: the running interpreter's standard library).

    Empty files, and files that are not valid UTF-8 (a few tests are broken on purpose), are left out before the split.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts[relative.as_posix()] = text
    if not texts:
        raise ConfigError(f"no Python sources below {folder}: give the folder of a standard library")
    parts = split(list(texts))
    return Corpus(*(tuple(Document(name, texts[name]) for name in part) for part in parts))


def train_tokenizer(texts: Sequence[str], *, vocab_size: int = 4096) -> Tokenizer:
    """A byte-level byte-pair tokenizer (Sennrich et al. 2016, arXiv:1508.07909); ids 0 and 1 are end-of-text and pad.

    Words, punctuation and white space are split as GPT-2 does. Patterns that join punctuation to the line break and
    indentation after it save 5 % of the tokens, but a prompt that ends in `):` is then unlike any training text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_length: int) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that `transformers` reads beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """One array a document, without special tokens: uint16, or int32 where the vocabulary is larger."""
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [np.asarray(e.ids, kind) for e in encoded]


def concatenate(documents: Sequence[np.ndarray], *, end: int = 0) -> np.ndarray:
    """`end d1 end d2 ... end`: one stream in which `end` both closes a document and opens the next."""
    parts = [np.array([end], documents[0].dtype if documents else np.uint16)]
    for tokens in documents:
        parts += [tokens, parts[0]]
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Stage:
    """From the start of the stage on, batches are [batch, length] and `weight` of their rows come from the modules."""

    start: int
    batch: int
    length: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Packed batches from two token streams (modules, tests), as a pure function of the step.

    Within a stage the windows of each stream are visited in a shuffled order that is new in each pass, and each pass
    cuts the stream at another offset. A window that starts inside a document is a segment of its own.

    In a share `copies` of the windows a stretch stands a second time, later in the window: a short training on little
    text does not otherwise teach a model to go on as before (induction: Olsson et al. 2022, arXiv:2209.11895).
    """

    modules: np.ndarray
    tests: np.ndarray
    stages: tuple[Stage, ...]
    seed: int
    end: int = 0
    copies: float = 0.0

    def stage(self, step: int) -> tuple[int, Stage]:
        """The number and the description of the stage that `step` (from 0) is in."""
        number = max(i for i, stage in enumerate(self.stages) if stage.start <= step)
        return number, self.stages[number]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """ids, targets, segments, positions i32[B,T]: the batch of the update that follows `step` completed ones."""
        number, stage = self.stage(step)
        first = (step - stage.start) * stage.batch
        rows = [self._row(number, stage, first + i) for i in range(stage.batch)]
        return pack(np.stack(rows), end=self.end)

    def _row(self, number: int, stage: Stage, row: int) -> np.ndarray:
        # Row n is the floor(n w)-th of the modules where floor((n + 1) w) is larger, else the next of the tests.
        index = int(np.floor(row * stage.weight + 1e-9))
        from_modules = int(np.floor((row + 1) * stage.weight + 1e-9)) > index
        source = self.modules if from_modules else self.tests
        index = index if from_modules else row - index
        windows = (len(source) - 1) // stage.length - 1
        if windows < 1:
            raise ConfigError(f"a stream of {len(source)} tokens is too short for windows of {stage.length}")
        epoch, place = divmod(index, windows)
        rng = np.random.default_rng((self.seed, number, int(from_modules), epoch))
        offset = int(rng.integers(stage.length))
        start = offset + int(rng.permutation(windows)[place]) * stage.length
        window = source[start : start + stage.length + 1]
        rng = np.random.default_rng((self.seed, number, int(from_modules), row, 1))
        return repeat_stretch(window, rng, end=self.end) if rng.random() < self.copies else window


def repeat_stretch(window: np.ndarray, rng: np.random.Generator, *, end: int = 0) -> np.ndarray:
    """The window with a stretch of a sixteenth to a half of it written again and again over its later tokens, at once
    or after a gap; the window itself where a document ends in between."""
    total = len(window)
    length = int(rng.integers(total // 16, total // 2 + 1))
    source = int(rng.integers(0, total - 2 * length + 1))
    target = source + length
    if rng.random() < 0.5:
        target = int(rng.integers(target, total - length + 1))
    if (window[source:] == end).any():
        return window
    copied = window.copy()
    copied[target:] = np.resize(window[source : source + length], total - target)
    return copied


def pack(windows: np.ndarray, *, end: int = 0) -> dict[str, np.ndarray]:
    """Windows [B,T+1] of a stream -> ids, targets, segments, positions i32[B,T]; `end` opens a segment."""
    ids = windows[:, :-1].astype(np.int32)
    opens = ids == end
    segments = np.cumsum(opens, axis=1, dtype=np.int32)
    index = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    last = np.maximum.accumulate(np.where(opens, index, 0), axis=1)
    return {"ids": ids, "targets": windows[:, 1:].astype(np.int32), "segments": segments, "positions": index - last}
