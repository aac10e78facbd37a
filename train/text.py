"""Training text from anyone's files, in a model's own tokens: JSON Lines, plain text, a folder of sources, or the
standard library.

`load` reads and splits: every tenth document is held out; of a single document, its last tenth. `Text.stream` packs the
rest into batches (`data.Stream`); `Text.bits_per_byte` measures a model on what is held out.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.checkpoint.tokenizer import Tokenizer
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.train import data, lm

EVERY = 10  # one document in so many is held out
FIELD = "text"
LINES = frozenset({".jsonl", ".ndjson"})


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Documents as integer ids. `train` is what training reads first of all, `more` is further training text (the
    tests of the standard library; empty for other data), `held_out` what nothing trains on, and `num_bytes` its length
    as text. `end` is the token that closes a document and opens the next; `digest` tells one corpus from another.
    """

    train: tuple[np.ndarray, ...]
    more: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]
    num_bytes: int
    end: int
    digest: str

    def stream(
        self, stages: Sequence[data.Stage], *, seed: int, copies: float = 0.0, more: Text | None = None
    ) -> data.Stream:
        """Packed batches, a function of the step. The stages' weight is the share of rows from `train`; the others
        come from `more` (default: this text's own), or from `train` too where there is none."""
        first = data.concatenate(self.train, end=self.end)
        other = self.more if more is None else more.train
        second = data.concatenate(other, end=self.end) if other else first
        return data.Stream(first, second, tuple(stages), seed, end=self.end, copies=copies)

    def bits_per_byte(self, step: Any, params: Any, *, documents: int | None = None, window: int = 512) -> float:
        """Bits a byte of the held-out text, or of about `documents` of its documents, spread evenly over it."""
        every = 1 if documents is None else max(1, len(self.held_out) // documents)
        chosen = self.held_out[::every]
        share = sum(map(len, chosen)) / sum(map(len, self.held_out))  # of the bytes, as near as the tokens tell
        size = max(1, round(self.num_bytes * share))
        return lm.bits_per_byte(step, params, chosen, num_bytes=size, window=window, stride=window // 2, end=self.end)


def load(path: str | Path | None, tokenizer: Tokenizer, *, vocab_size: int) -> Text:
    """The text at `path` in the tokens of a model of `vocab_size`; None is the standard library's sources.

    Raises InputError naming file and line where the text cannot be read, is empty, or has tokens that the model lacks.
    """
    if not tokenizer.eos_ids:
        raise InputError("the tokenizer names no end-of-text token, which separates documents in training")
    end = tokenizer.eos_ids[0]
    if path is None:
        corpus = data.standard_library()
        parts = [corpus.modules, corpus.tests, corpus.held_out]
    else:
        documents = read(path)
        parts = _split(documents, path)
    train, more, held_out = (_encode(part, tokenizer, vocab_size) for part in parts)
    h = hashlib.sha256()
    for part in parts:
        for document in part:
            h.update(f"{document.name}\0{document.text}\0".encode())
    size = sum(document.num_bytes for document in parts[2])
    return Text(train, more, held_out, size, end, h.hexdigest()[:16])


def read(path: str | Path) -> list[data.Document]:
    """The documents of a JSON Lines file (`text` of each row), a text file, or a folder of UTF-8 files."""
    path = Path(path)
    if path.is_dir():
        found = _folder(path)
    elif not path.is_file():
        raise InputError(f"{path}: no such file or folder; accepted: JSON Lines with a `text` field, .txt, a folder")
    elif path.suffix.lower() in LINES:
        found = _lines(path)
    else:
        found = [data.Document(path.name, _utf8(path))]
    found = [document for document in found if document.text.strip()]
    if not found:
        raise InputError(f"{path}: no text in it")
    return found


def _folder(folder: Path) -> list[data.Document]:
    found = []
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or data.SKIPPED_FOLDERS & set(relative.parts) or not file.is_file():
            continue
        try:
            content = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # an image, an archive: not text
            continue
        if "\0" not in content:
            found.append(data.Document(relative.as_posix(), content))
    return found


def _lines(path: Path) -> list[data.Document]:
    return [data.Document(f"{path.name}:{number}", row[FIELD]) for number, row in rows(path, FIELD)]


def rows(path: str | Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each row of a JSON Lines file, with text in `field`; InputError naming file and line
    for anything else."""
    for number, line in enumerate(_utf8(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise InputError(f"{path}, line {number}: accepted: an object whose {field!r} is a string")
        if any("\ud800" <= c <= "\udfff" for c in row[field]):
            raise InputError(f"{path}, line {number}: a lone surrogate, which is not a character")
        yield number, row


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _split(documents: list[data.Document], path: str | Path) -> list[list[data.Document]]:
    """[train, more, held out]; held out are documents number 0, 10, 20, ... or the end of a single one."""
    if len(documents) > 1:
        return [[d for i, d in enumerate(documents) if i % EVERY], [], documents[::EVERY]]
    name, whole = documents[0].name, documents[0].text
    cut = len(whole) - max(1, len(whole) // EVERY)
    if not whole[:cut].strip() or not whole[cut:].strip():
        raise InputError(f"{path}: {len(whole)} characters are too few to train on and to hold some out")
    return [[data.Document(name, whole[:cut])], [], [data.Document(name + ":end", whole[cut:])]]


def _encode(documents: Sequence[data.Document], tokenizer: Tokenizer, vocab_size: int) -> tuple[np.ndarray, ...]:
    rows = tuple(row for row in data.encode(tokenizer.backend, documents) if len(row))
    most = max((int(row.max()) for row in rows), default=0)
    if most >= vocab_size:
        raise InputError(f"the tokenizer gives token {most}, but the model's vocabulary has {vocab_size} tokens")
    return rows


def check_vocabulary(tokenizer: Tokenizer, other: Tokenizer, *, name: str, other_name: str) -> None:
    """Raise ConfigError unless the two tokenizers give every token the same id: a draft must speak the target's."""
    one, two = (t.backend.get_vocab(with_added_tokens=True) for t in (tokenizer, other))
    if one == two:
        return
    differing = sorted(token for token in {*one, *two} if one.get(token) != two.get(token))
    token = differing[0]
    raise ConfigError(
        f"{other_name} and {name} have different vocabularies: {len(differing)} tokens differ, such as {token!r} "
        f"(id {two.get(token)} and {one.get(token)}); accepted: models of one tokenizer"
    )
