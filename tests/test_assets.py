"""The embedded models: small enough to ship, what their cards say, and equal to transformers token for token."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import decode
from jaxinfer.checkpoint import hub
from jaxinfer.models.heads import load_head
from jaxinfer.models.hf import load_config
from jaxinfer.train.data import standard_library

ASSETS = Path(jaxinfer.__file__).parent / "assets"
NAMES = ("tinycode", "tinycode-draft")


def bits_per_byte(name: str) -> float:
    """The figure on the model's card."""
    found = re.search(r"\*\*([0-9.]+) bits per byte\*\*", (ASSETS / name / "README.md").read_text())
    assert found, f"the card of {name} names no bits per byte"
    return float(found[1])


def test_small_enough_and_of_one_vocabulary():
    assert sum(file.stat().st_size for name in NAMES for file in (ASSETS / name).iterdir()) < 24e6
    target, draft = (load_config(ASSETS / name) for name in NAMES)
    assert (target.vocab_size, target.eos) == (draft.vocab_size, draft.eos)
    assert len({(ASSETS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


def test_packaged_heads_are_small_and_of_this_target():
    """Each fits the target that is shipped beside it, and its card names the figure in scripts/results."""
    results = Path(__file__).parent.parent / "scripts/results"
    target = jaxinfer.load("tinycode", dtype="float32")
    for folder in (file.parent for file in ASSETS.glob("*/heads.json")):
        assert folder.name in hub.PACKAGED_HEADS and hub.resolve(folder.name) == folder
        assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
        head = load_head(folder)
        head.check(target.config, target.params)
        if (measured := results / f"train_heads-{head.head.kind}-cpu.json").is_file():
            [row] = json.loads(measured.read_text())["rows"]
            assert f"{row['tokens_per_forward']:.2f} tokens a forward" in (folder / "README.md").read_text()


def test_cards_say_what_was_measured():
    results = Path(__file__).parent.parent / "scripts/results"
    for model, name in (("target", "tinycode"), ("draft", "tinycode-draft")):
        [row] = json.loads((results / f"train_tiny-{model}-cpu.json").read_text())["rows"]
        assert round(row["bits_per_byte"], 3) == bits_per_byte(name)
    assert bits_per_byte("tinycode") < bits_per_byte("tinycode-draft")


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name):
    """Token for token on 20 prompts from held-out modules, 48 tokens each."""
    import torch
    import transformers

    lm = jaxinfer.load(name, dtype="float32")
    texts = [document.text for document in standard_library().held_out if document.num_bytes > 4000][:20]
    prompts = np.asarray([lm.tokenizer.encode(text)[40:72] for text in texts], np.int32)
    config = decode.Config(max_tokens=48)
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    lengths = np.full(20, 32, np.int32)
    ours = generate(lm.step, lm.params, prompts, lengths, config=config, key=jax.random.key(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    for row, (prompt, length) in enumerate(zip(prompts, np.asarray(ours.lengths), strict=True)):
        with torch.inference_mode():
            ids = torch.from_numpy(prompt[None].astype(np.int64))
            theirs = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=1)[0, 32:].numpy()
        np.testing.assert_array_equal(np.asarray(ours.tokens)[row, :length], theirs, err_msg=f"prompt {row}")
