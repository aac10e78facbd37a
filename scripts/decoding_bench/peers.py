"""transformers' own speculative decoding on the same checkpoints and prompts: assisted generation, prompt lookup.

Float32 on torch's CPU build with every core, one prompt at a time (it serves no more), its default settings. Forwards
of the target are counted, the prefill among them: it makes a token there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding_bench.ours import Setting

SETTINGS = {
    "transformers plain": {},
    "transformers prompt lookup": {"prompt_lookup_num_tokens": 10},
    "transformers assisted": {"assistant_model": None},  # replaced by the draft
}


@dataclasses.dataclass
class Peer:
    """`run` decodes the setting's prompts and returns lists of token ids; `forwards` counts since the last reset."""

    run: Callable[[], list[list[int]]]
    forwards: int = 0


def peers(target: Path, draft: Path, setting: Setting) -> dict[str, Peer]:
    """Every peer on the models saved in `target` and `draft`."""
    import torch
    import transformers

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    model, assistant = load(target), load(draft)
    made = {name: Peer(lambda: []) for name in SETTINGS}
    current: list[Peer] = []
    model.register_forward_hook(lambda *_: [setattr(p, "forwards", p.forwards + 1) for p in current] and None)
    sampled = setting.temperature > 0
    common = dict(
        max_new_tokens=setting.tokens, min_new_tokens=setting.tokens, do_sample=sampled, eos_token_id=None,
        pad_token_id=0, **({"temperature": setting.temperature, "top_k": 0} if sampled else {}),
    )  # fmt: skip

    def runner(peer: Peer, options: dict[str, Any]) -> Callable[[], list[list[int]]]:
        def run() -> list[list[int]]:
            found = []
            torch.manual_seed(0)
            current[:] = [peer]
            for prompt in setting.prompts:
                ids = torch.tensor([prompt])
                with torch.inference_mode():
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), **common, **options)
                found.append(out[0, len(prompt) :].tolist())
            current.clear()
            return found

        return run

    for name, options in SETTINGS.items():
        extra = {"assistant_model": assistant} if "assistant_model" in options else options
        made[name].run = runner(made[name], extra)
    return made
