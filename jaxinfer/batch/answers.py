"""Answers as JSON lines: one for each row, keys in a stable order, in the form that the row came in.

A row gets `{"id", "text", "finish_reason", "usage"}`, with `choices` where it asked for several answers and
`logprobs` where it asked for them; a row that failed gets `{"id", "error"}`. OpenAI batch rows get OpenAI's shape.
Nothing in a line depends on when or where it was computed (OpenAI's `created` is 0), so that a resumed job writes
the same bytes.

Stability: experimental.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.batch.requests import BadRow, Codec, Prepared, Request, identity

TopTokens = tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclass(frozen=True)
class Sample:
    """One answer: `tokens` up to the one that ended it, `text` without stops; log-probabilities for each token."""

    text: str
    finish_reason: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top: tuple[TopTokens, ...] | None = None


def answer_line(row: Prepared, samples: Sequence[Sample], codec: Codec) -> bytes:
    """The JSON line, newline included, of a row with all its samples."""
    request = row.request
    completion = sum(len(sample.tokens) for sample in samples)
    usage = {
        "prompt_tokens": len(row.tokens),
        "completion_tokens": completion,
        "total_tokens": len(row.tokens) + completion,
    }
    echo = ""
    if request.params.echo:
        echo = request.prompt if isinstance(request.prompt, str) else codec.decode(row.tokens)
    texts = [echo + sample.text for sample in samples]
    if request.form != "row":
        return _line(_openai(request, samples, texts, usage, codec))
    choices = []
    for text, sample in zip(texts, samples, strict=True):
        choice: dict[str, Any] = {"text": text, "finish_reason": sample.finish_reason}
        if request.params.logprobs is not None:
            choice["logprobs"] = _logprobs(sample, codec)
        choices.append(choice)
    answer: dict[str, Any] = {"id": request.id, "text": texts[0], "finish_reason": samples[0].finish_reason}
    answer["usage"] = usage
    if request.params.n > 1:
        answer["choices"] = [{"index": index, **choice} for index, choice in enumerate(choices)]
    elif request.params.logprobs is not None:
        answer["logprobs"] = choices[0]["logprobs"]
    return _line(answer)


def error_line(row: BadRow) -> bytes:
    """The JSON line, newline included, of a row that could not be answered."""
    if row.form == "row":
        return _line({"id": row.id, "error": row.error})
    error = {"code": "invalid_request", "message": row.error}
    return _line({"id": _batch_id(row.id), "custom_id": row.id, "response": None, "error": error})


def tally(line: bytes) -> tuple[bool, int, int]:
    """(failed, prompt tokens, answer tokens) of an answer line, for the report."""
    answer = json.loads(line)
    if answer.get("error") is not None:
        return True, 0, 0
    usage = answer["usage"] if "usage" in answer else answer["response"]["body"]["usage"]
    return False, usage["prompt_tokens"], usage["completion_tokens"]


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _batch_id(row_id: str | int) -> str:
    return "batch_req_" + hashlib.sha256(identity(row_id)).hexdigest()[:24]


def _number(logprob: float) -> float | None:
    """Six decimals; nothing for minus infinity, which JSON cannot hold."""
    return round(float(logprob), 6) if math.isfinite(logprob) else None


def _logprobs(sample: Sample, codec: Codec) -> list[dict[str, Any]]:
    """One entry for each answer token: its id, text and log-probability, and the likeliest tokens where asked for."""
    out = []
    tops: Sequence[TopTokens] = sample.top or ((),) * len(sample.tokens)
    for token, logprob, top in zip(sample.tokens, sample.logprobs or (), tops, strict=True):
        entry: dict[str, Any] = {"id": token, "token": codec.decode([token]), "logprob": _number(logprob)}
        if top:
            entry["top"] = [{"id": i, "token": codec.decode([i]), "logprob": _number(p)} for i, p in top]
        out.append(entry)
    return out


def _openai(
    request: Request, samples: Sequence[Sample], texts: Sequence[str], usage: dict[str, int], codec: Codec
) -> dict[str, Any]:
    chat = request.form == "chat"
    choices = []
    for index, (text, sample) in enumerate(zip(texts, samples, strict=True)):
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        entries = _logprobs(sample, codec) if request.params.logprobs is not None else None
        logprobs = None if entries is None else _chat_logprobs(entries) if chat else _completion_logprobs(entries)
        choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": sample.finish_reason})
    batch_id = _batch_id(request.id)
    body = {
        "id": batch_id.replace("batch_req_", "chatcmpl-" if chat else "cmpl-"),
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.model or "",
        "choices": choices,
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": batch_id, "body": body}
    return {"id": batch_id, "custom_id": request.id, "response": response, "error": None}


def _chat_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    def token(entry: dict[str, Any]) -> dict[str, Any]:
        return {"token": entry["token"], "logprob": entry["logprob"], "bytes": list(entry["token"].encode())}

    return {"content": [{**token(e), "top_logprobs": [token(t) for t in e.get("top", ())]} for e in entries]}


def _completion_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    offsets, at = [], 0
    for entry in entries:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{t["token"]: t["logprob"] for t in entry.get("top", ())} for entry in entries],
        "text_offset": offsets,
    }
