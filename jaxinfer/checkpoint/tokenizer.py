"""Text to ids and back: a Hugging Face `tokenizer.json` through the `tokenizers` library, without transformers.

Special tokens come from tokenizer_config.json (older directories: special_tokens_map.json); the ids that end a text
from generation_config.json, else config.json, else the tokenizer's eos_token: the order of `transformers.generate`.
Whether BOS is added is written in tokenizer.json itself (its post-processor); like transformers 5, we pay no attention
to `add_bos_token` beside it.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import tokenizers

from jaxinfer.checkpoint.safetensors_io import read_json
from jaxinfer.errors import CheckpointError, InputError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what its directory says about special tokens. Make one with `Tokenizer.load(directory)`.

    `special_tokens` maps names to text (`{"bos_token": "<s>", ...}`): the variables that a chat template expects.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    eos_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read a directory's tokenizer. Raises CheckpointError naming the file that is missing or broken."""
        directory = Path(directory)
        backend = _backend(directory)
        special = _special_tokens(directory)
        _register(backend, special)
        eos = _eos_ids(directory, backend, special)
        pad = backend.token_to_id(special["pad_token"]) if "pad_token" in special else None
        bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        return cls(backend, MappingProxyType(special), eos, bos, pad if pad is not None else (eos or (0,))[0])

    @property
    def vocab_size(self) -> int:
        """Number of ids that stand for a token. The model's may be larger: embeddings are often padded."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with `add_special_tokens` the model's BOS is added where its tokenizer adds one."""
        return self._encode([text], add_special_tokens)[0].ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens i32[B, P], lengths i32[B]), padded on the right with `pad_id`; P is `length` or the longest text's.

        Raises InputError if a text has more than `length` tokens: cutting is the caller's decision.
        """
        rows = [e.ids for e in self._encode(list(texts), add_special_tokens)]
        lengths = np.asarray([len(r) for r in rows], np.int32)
        longest = max(map(len, rows), default=0)
        if length is not None and longest > length:
            raise InputError(f"text {int(lengths.argmax())} has {longest} tokens, at most {length} are accepted")
        tokens = np.full((len(rows), longest if length is None else length), self.pad_id, np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        return tokens, lengths

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids without a token are skipped; incomplete UTF-8 becomes U+FFFD."""
        numbers = [int(i) for i in ids]
        if any(not 0 <= i < 2**32 for i in numbers):
            raise InputError(f"token ids are non-negative integers, got {min(numbers)}..{max(numbers)}")
        try:
            return self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        except BaseException as e:
            _reraise(e, InputError, "cannot decode the ids")

    def token_id(self, token: str) -> int | None:
        """The id of one token's text, or None."""
        return self.backend.token_to_id(token)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is a {type(text).__name__}; a string is expected")
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise InputError(f"text {i} has a lone surrogate, which is not a character")
        try:
            return self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except BaseException as e:
            _reraise(e, InputError, "cannot encode the text")


def _reraise(e: BaseException, kind: type[Exception], what: str) -> NoReturn:
    """The library raises bare Exception, and PanicException (a BaseException) where its Rust code asserts."""
    if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError | GeneratorExit):
        raise e
    raise kind(f"{what}: {str(e)[:300]}") from None


def _backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        held = [n for n in ("tokenizer.model", "vocab.json", "spiece.model") if (directory / n).is_file()]
        also = f" ({', '.join(held)} is not read)" if held else ""
        raise CheckpointError(
            f"{directory}: no tokenizer.json{also}. Where transformers is installed this writes one: python -c 'from "
            f'transformers import AutoTokenizer as T; T.from_pretrained("{directory}")'
            f'.save_pretrained("{directory}")\''
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as e:
        _reraise(e, CheckpointError, f"{file}: not a tokenizer")
    backend.no_truncation()  # a file may carry the limits of its training run
    backend.no_padding()
    return backend


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _special_tokens(directory: Path) -> dict[str, str]:
    config = _optional(directory / "tokenizer_config.json")
    merged = {**_optional(directory / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    special = {}
    for name in _NAMED:
        value = merged.get(name)
        value = value.get("content") if isinstance(value, dict) else value  # an AddedToken, written out
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{directory / 'tokenizer_config.json'}: {name} must be text, got {str(value)[:80]}")
        if value is not None:
            special[name] = value
    return special


def _register(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
    """A named special token is one everywhere: cut out of text before it is split, and left out of decoded text."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = [t for t in dict.fromkeys(special.values()) if t not in known and backend.token_to_id(t) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in named])


def _eos_ids(directory: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        record = _optional(directory / name)
        text = record.get("text_config")
        value = record.get("eos_token_id")
        if value is None and isinstance(text, dict):  # multi-modal configurations nest the language model's
            value = text.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise CheckpointError(f"{directory / name}: eos_token_id must be ids, got {str(value)[:80]}")
        if ids:
            return tuple(dict.fromkeys(ids))
    found = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return () if found is None else (found,)
