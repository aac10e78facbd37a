"""Three task sets made of held-out modules of the standard library, from what no drafter foresees to what it has seen.

free: the middle of a module, to be continued. edit: a function, the same function under another name, and the first
tokens of a third version: the model repeats it. repetitive: tables and literals, the windows whose next tokens repeat
their own n-grams most. (The fourth, JSON under a schema, is `schema`.)
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from jaxinfer.train.data import Document, standard_library

Encode = Callable[[str], list[int]]
NGRAM = 4
OPENING = 16  # tokens of the third version that are given


@dataclasses.dataclass(frozen=True)
class Task:
    """`prompts`: token ids of each; at least as many as were asked for, or SystemExit."""

    name: str
    prompts: tuple[tuple[int, ...], ...]


def tasks(encode: Encode, *, count: int, length: int, answer: int) -> dict[str, Task]:
    """Every task set with `count` prompts of at most `length` tokens, one a module; `answer`: tokens to come."""
    documents = [d for d in standard_library().held_out if d.num_bytes > 2000]
    makers = {"free": _free, "edit": _edit, "repetitive": _repetitive}
    found = {}
    for name, make in makers.items():
        prompts = make(documents, encode, length, answer)[:count]
        if len(prompts) < count:
            raise SystemExit(f"{name}: the held-out modules give {len(prompts)} prompts, {count} are needed")
        found[name] = Task(name, tuple(tuple(prompt) for prompt in prompts))
    return found


def _free(documents: Sequence[Document], encode: Encode, length: int, answer: int) -> list[list[int]]:
    prompts = []
    for document in documents:
        ids = encode(document.text[:60_000])
        if len(ids) >= 2 * (length + answer):
            middle = len(ids) // 2
            prompts.append(ids[middle : middle + length // 2])
    return prompts


def _functions(document: Document) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Top-level functions and methods with their source, dedented."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.col_offset == 0:
            yield node, ast.get_source_segment(document.text, node) or ""


def _edit(documents: Sequence[Document], encode: Encode, length: int, answer: int) -> list[list[int]]:
    prompts = []
    for document in documents:
        for node, source in _functions(document):
            versions = [source.replace(node.name, node.name + suffix) for suffix in ("", "_twice", "_again")]
            ids = encode("\n\n\n".join(versions))
            given = len(encode("\n\n\n".join(versions[:2]))) + OPENING
            if answer <= len(ids) - given and given <= length:  # cut between tokens, not where a text would end
                prompts.append(ids[:given])
                break
    return prompts


def _repetitive(documents: Sequence[Document], encode: Encode, length: int, answer: int) -> list[list[int]]:
    scored = []
    for document in documents:
        ids = encode(document.text[:60_000])
        starts = range(0, len(ids) - length - answer, length)
        if starts:
            scored.append(max((_repeats(ids, start, length, answer), start, tuple(ids)) for start in starts))
    scored.sort(reverse=True)
    return [list(ids[start : start + length]) for _, start, ids in scored]


def _repeats(ids: Sequence[int], start: int, length: int, answer: int) -> float:
    """Share of the n-grams of the answer that the text before them has."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(start, start + length + answer - NGRAM)]
    seen, hits = set(grams[: length - NGRAM]), 0
    for gram in grams[length - NGRAM :]:
        hits += gram in seen
        seen.add(gram)
    return hits / answer
