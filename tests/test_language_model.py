"""`jaxinfer.load(...)`: text in and text out through the pure functions, whatever the buckets, pieces and looks."""

import jax
import numpy as np
import pytest

from jaxinfer import decode, quant
from jaxinfer.decode import run as host
from jaxinfer.decode.language_model import load
from jaxinfer.decode.sampling import Features
from jaxinfer.decode.types import Reason
from jaxinfer.errors import CheckpointError, InputError
from jaxinfer.sharding.rules import TENSOR, shardings

PROMPTS = ["def f(x):", "import os, sys\nimport json\n", "é", "class A:\n    pass\n\n\nclass B"]


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def drafted(tiny_model, tiny_draft):
    return load(tiny_model, draft=tiny_draft)


@pytest.fixture(scope="module")
def greedy(lm):
    """Four prompts in one batch."""
    return lm.generate(PROMPTS, max_tokens=24, logprobs=2)


def naive(lm, prompt: str, count: int) -> list[int]:
    """Greedy tokens by running the whole model anew for every token, without a cache, in a fixed width."""
    ids = lm.tokenizer.encode(prompt)

    @jax.jit
    def logits(tokens, positions, last):
        hidden = lm.step(lm.params, tokens, positions)[0].hidden[0, last]
        return lm.step.head(lm.params, hidden)

    for _ in range(count):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        positions = np.where(np.arange(64) < len(ids), np.arange(64), -1)[None].astype(np.int32)
        ids.append(int(logits(tokens, positions, len(ids) - 1).argmax()))
        if ids[-1] in lm.tokenizer.eos_ids:
            break
    return ids[-count:]


def test_greedy_is_the_models_argmax(lm, greedy):
    for prompt, answer in list(zip(PROMPTS, greedy, strict=True))[:2]:
        assert list(answer.tokens) == naive(lm, prompt, len(answer.tokens))


def test_completion_adds_up(lm, greedy):
    for prompt, answer in zip(PROMPTS, greedy, strict=True):
        assert answer.usage["prompt_tokens"] == len(lm.tokenizer.encode(prompt))
        assert answer.usage["completion_tokens"] == len(answer.tokens) == answer.stats.emitted == answer.stats.forwards
        assert answer.text == lm.tokenizer.decode(answer.tokens)
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in lm.tokenizer.eos_ids else "length")
        assert len(answer.logprobs) == len(answer.top_logprobs) == len(answer.tokens)
        for token, logprob, top in zip(answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
            assert top[0] == (token, logprob)


def test_one_prompt_alone_and_with_others(lm, greedy):
    alone = lm.generate(PROMPTS[0], max_tokens=24, logprobs=2)
    assert alone.tokens == greedy[0].tokens
    np.testing.assert_allclose(alone.logprobs, greedy[0].logprobs, atol=1e-4)


def test_nothing_is_compiled_twice_in_a_bucket(lm, greedy):
    """Steady state: other prompts, lengths and limits of the same bucket trace nothing."""
    before = [f.jitted._cache_size() for f in (host._begin, host._advance, host._result)]
    lm.generate(["x = 1", "y", "z" * 30, "if a:"], max_tokens=9, logprobs=2)
    assert [f.jitted._cache_size() for f in (host._begin, host._advance, host._result)] == before


def test_equals_the_pure_functions(lm, greedy):
    """What `generate` does is `decode.generate` on encoded prompts."""
    tokens, lengths = lm.encode(PROMPTS)
    config = decode.Config(max_tokens=24, eos=lm.tokenizer.eos_ids)
    out = jax.jit(decode.generate, static_argnames=("step", "config"))(
        lm.step, lm.params, tokens, lengths, config=config, key=jax.random.key(0)
    )
    assert lm.decode(out) == [answer.text for answer in greedy]


def test_stream_is_generate(lm, greedy):
    ends = []
    pieces = list(lm.stream(PROMPTS[1], max_tokens=24, logprobs=2, on_finish=ends.append))
    assert len(pieces) > 1
    assert "".join(pieces) == greedy[1].text == ends[0].text
    assert ends[0].tokens == greedy[1].tokens


def test_stop_strings_cut_text_tokens_and_logprobs(lm, greedy):
    """A stop string across token borders, alone and streamed; min_tokens lets the first matches through."""
    full = lm.tokenizer.decode(greedy[0].tokens)
    stop = full[7:11]
    where = full.index(stop)
    stopped = lm.generate(PROMPTS[0], max_tokens=24, logprobs=2, stop=[stop, "never"])
    assert (stopped.text, stopped.finish_reason) == (full[:where], "stop")
    assert len(stopped.logprobs) == len(stopped.tokens) == stopped.usage["completion_tokens"] < 24
    assert stopped.tokens == greedy[0].tokens[: len(stopped.tokens)]
    assert stop in lm.tokenizer.decode(stopped.tokens)
    assert "".join(lm.stream(PROMPTS[0], max_tokens=24, logprobs=2, stop=[stop])) == full[:where]
    (row,) = lm._prepare(PROMPTS[:1], lm_params(max_tokens=24, stop=stop, min_tokens=24))
    late = host.Answer(row, lm.codec)
    late.take(greedy[0].tokens, Reason.LENGTH)
    assert (len(late.tokens), late.text, late.reason) == (24, full, "length")


def test_sampling_follows_the_seed(lm):
    one, again, other = (lm.generate("a", seed=seed, max_tokens=12, temperature=1.0, n=2) for seed in (3, 3, 4))
    assert [c.tokens for c in one] == [c.tokens for c in again]
    assert [c.tokens for c in one] != [c.tokens for c in other]
    assert one[0].tokens != one[1].tokens


def test_seeds_have_64_bits():
    assert np.array_equal(jax.random.key_data(host._key(7)), jax.random.key_data(jax.random.key(7)))
    assert not np.array_equal(jax.random.key_data(host._key(7)), jax.random.key_data(host._key(7 + 2**32)))


def test_groups_keep_the_order(lm, greedy):
    """More prompts than fit a batch: the answers come in the prompts' order."""
    answers = lm.generate(PROMPTS[::-1] + PROMPTS, max_tokens=24, logprobs=2, batch_size=4)
    assert [a.tokens for a in answers] == [a.tokens for a in greedy[::-1] + greedy]


def test_draft_model_changes_no_token(drafted, greedy):
    """The draft model is used by default, and only then."""
    answer = drafted.generate(PROMPTS[0], max_tokens=24)
    assert answer.tokens == greedy[0].tokens
    assert answer.stats.proposed > 0
    plain = drafted.generate(PROMPTS[0], max_tokens=24, logprobs=2, drafter=decode.Autoregressive())
    assert plain.stats.proposed == 0


def test_quantized_as_it_is_loaded(tiny_model, lm):
    rules = [(r".*/mlp/.*", quant.Int8()), (r"head", None)]
    loaded = load(tiny_model, weights=rules).params
    after = quant.apply(lm.params, rules)
    assert isinstance(loaded["layers_0"]["mlp"]["gate"], quant.QuantizedArray)
    assert jax.tree.structure(loaded) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_go_where_the_shardings_say(tiny_model):
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    params = load(tiny_model, shardings=lambda step: shardings(step, mesh, TENSOR)).params
    assert params["layers_0"]["mlp"]["gate"].sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    assert params["layers_0"]["mlp"]["gate"].addressable_shards[0].data.shape == (32, 32)


def test_chat_is_the_rendered_prompt(lm):
    answer = lm.chat([{"role": "user", "content": "hi"}], max_tokens=24, logprobs=2)
    assert answer.tokens == lm.generate("<user>hi\n<assistant>", max_tokens=24, logprobs=2).tokens


def test_sampling_arrays_say_only_what_was_asked(lm):
    """A greedy row pays for nothing: no sampling, no filters, no penalties in its program."""
    (row,) = lm._prepare(["x"], lm_params())
    assert Features.of(host._sampling([row], 2)) == Features()
    (row,) = lm._prepare(["x"], lm_params(temperature=0.5, top_k=3, banned_tokens=[5], min_tokens=2, forced_tokens=[7]))
    features = Features.of(host._sampling([row], 1))
    assert features == Features(sample=True, top_k=True, bias=True, min_tokens=True, forced=True)


def lm_params(**options):
    from jaxinfer.batch.params import from_options

    return from_options(options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lm: lm.generate("x", max_token=3), "max_token: unknown sampling parameter; accepted: max_tokens"),
        (lambda lm: lm.generate("x", top_p=0), "top_p: got 0; accepted: a number above 0 up to 1"),
        (lambda lm: lm.generate(["x", ""]), "prompt 1: prompt: got no tokens"),
        (lambda lm: lm.generate("x" * 2000), "accepted: at most 511"),
        (lambda lm: lm.generate("x", banned_tokens=[400]), "banned_tokens: got token id 400; accepted: 0 to 399"),
        (lambda lm: lm.generate(3), "prompt: got int; accepted: text, a list of messages"),
        (lambda lm: lm.generate([3]), "prompt: got int; accepted: text"),
        (lambda lm: lm.stream("x", n=2), "stream: got several answers"),
        (lambda lm: lm.chat("hi"), "chat: got text, 'hi'"),
        (lambda lm: lm.encode("hi"), "encode: got 'hi'; accepted: a list of texts"),
        (lambda lm: lm.encode(["a", ""]), "encode: got text 1 without a token"),
    ],
)
def test_wrong_input_is_said_before_anything_runs(lm, call, said):
    with pytest.raises(InputError) as error:
        call(lm)
    assert said in str(error.value)


def test_load_errors(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="matches no whole path"):
        load(tiny_model, weights=[("mlp", quant.Int8())])
