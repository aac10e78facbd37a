"""UloRL: its pure functions by hand, segments that make the answers of one piece, pools that survive a kill."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.tokenizer import Tokenizer
from jaxinfer.cli import compiled, main
from jaxinfer.errors import CheckpointError, ConfigError, InputError, JobError
from jaxinfer.train import loop, metrics, rl_tasks, rollout, ulorl
from tests import toy

MODEL = toy.Markov(5, period=16)  # token 0 ends an answer
PARAMS = MODEL.params(0)
SETTINGS = rollout.Settings(groups=4, samples=4, max_tokens=6, segments=3)


def starts_with_two(row, answer):
    """A reward that is easy to earn."""
    return float(answer.startswith("2"))


def task(reward=starts_with_two):
    prompts = [{"prompt": str(1 + i % 4)} for i in range(12)]
    tokens = [np.asarray([int(row["prompt"])] * (1 + i % 2), np.int32) for i, row in enumerate(prompts)]
    return rollout.Task(prompts, tokens, reward, lambda ids: "".join(map(str, ids)), (0,), "toy", every=6)


def source(settings=SETTINGS, **changes):
    return rollout.Rollouts(MODEL, changes.pop("task", task()), settings, **changes)


def test_advantages_and_dynamic_sampling():
    rewards = jnp.asarray([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = np.asarray(ulorl.group_advantages(rewards))
    np.testing.assert_allclose(found[0], (np.array([1, 0, 0, 0]) - 0.25) / np.sqrt(0.1875), rtol=1e-6)
    np.testing.assert_array_equal(found[1:], 0)
    assert ulorl.worth_training(rewards).tolist() == [True, False, False]


def test_ratios():
    logp, old = jnp.log(jnp.asarray([0.5, 0.2])), jnp.log(jnp.asarray([0.25, 0.4]))
    np.testing.assert_allclose(ulorl.pois_ratio(logp, old), 1)
    np.testing.assert_allclose(jax.jacobian(ulorl.pois_ratio)(logp, old), np.eye(2))
    np.testing.assert_allclose(ulorl.sais_ratio(logp, old), [2, 0.5], rtol=1e-6)
    worth = lambda sign: ulorl.clipped(jnp.asarray([2.0, 0.5]), sign * jnp.ones(2), 0.2, 0.28)  # noqa: E731
    np.testing.assert_allclose(worth(1.0), [1.28, 0.5], rtol=1e-6)
    np.testing.assert_allclose(worth(-1.0), [-2.0, -0.8], rtol=1e-6)


def test_mastered_tokens_are_masked_where_the_answer_is_right_and_its_entropy_low():
    logp = jnp.log(jnp.asarray([[0.995, 0.5, 0.999], [0.995, 0.5, 0.999], [0.995, 0.995, 0.999]]))
    entropy = jnp.asarray([[0.1, 0.2, 9.0], [0.1, 0.2, 9.0], [0.9, 0.8, 9.0]])
    counted, correct = jnp.asarray([[True, True, False]] * 3), jnp.asarray([True, False, True])
    np.testing.assert_allclose(ulorl.answer_entropy(entropy, counted), [0.15, 0.15, 0.85], rtol=1e-6)
    masked = lambda sigma: ulorl.mastered(logp, entropy, counted, correct, 0.99, sigma).astype(int).tolist()  # noqa: E731
    assert masked(0.2) == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert masked(np.inf) == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert not np.any(masked(0.0))


@pytest.fixture(scope="module")
def batch():
    """A batch of several groups and segments, the second from other params."""
    made = source(behaviour=True)
    made.next(PARAMS, 0)
    return made.next(MODEL.params(1), 1)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_answers_log_probabilities_times_advantages(batch):
    law = jax.nn.log_softmax(PARAMS["table"] / 0.85)
    logp = np.asarray(law[np.maximum(batch["positions"], 0) % 16, batch["ids"], batch["targets"]])
    right = batch["counted"] & batch["correct"][:, None]
    tau = 0.999 * float(np.exp(np.median(logp[right])))  # so that half of the tokens of right answers are mastered
    mastered = right & (logp >= np.log(tau))
    assert mastered.any() and (batch["counted"] & ~mastered).any()
    objective = ulorl.UloRL(MODEL, temperature=0.85, tau=tau, sigma=np.inf)
    run = jax.jit(jax.value_and_grad(lambda params, batch: objective(params, batch, None), has_aux=True))
    (_, told), found = run(PARAMS, batch)
    np.testing.assert_allclose(told["masked"], mastered.sum() / batch["counted"].sum(), rtol=1e-6)

    def expected(params, kept):
        law = jax.nn.log_softmax(params["table"] / 0.85)
        logp = law[np.maximum(batch["positions"], 0) % 16, batch["ids"], batch["targets"]]
        return -jnp.sum(logp * batch["advantage"][:, None] * kept) / batch["counted"].sum()

    close = lambda kept: np.allclose(found["table"], jax.grad(expected)(PARAMS, kept)["table"], atol=1e-6)  # noqa: E731
    assert close(batch["counted"] & ~mastered)
    assert not close(batch["counted"])  # the planted bug: nothing is masked


def test_behaviour_is_what_wrote_each_segment(batch):
    """In a batch of answers whose segments two policies wrote, SAIS's ratios to the one that wrote are 1 there."""
    laws = [np.asarray(jax.nn.log_softmax(MODEL.params(i)["table"] / 0.85)) for i in (0, 1)]
    at = np.maximum(batch["positions"], 0) % 16, batch["ids"], batch["targets"]
    old, new = (np.abs(law[at] - batch["behaviour"]) < 1e-5 for law in laws)
    counted = batch["counted"]
    assert (old | new)[counted].all() and (old & ~new & counted).any() and (new & ~old & counted).any()


def finished(made, rounds):
    """Every answer's tokens after rounds with the same params, by number."""
    found = {}
    for i in range(rounds):
        made._admit()
        made._roll(PARAMS, i)
        found |= {a.number: tuple(a.tokens) for a in made.experience}
    return found


def test_an_answer_in_segments_is_the_answer_in_one_piece():
    parts = finished(source(), 5)
    whole = finished(source(dataclasses.replace(SETTINGS, segments=1)), 2)
    both = sorted(parts.keys() & whole.keys())
    assert len(both) >= 24 and max(len(parts[n]) for n in both) > 2 * SETTINGS.segment
    assert [parts[n] for n in both] == [whole[n] for n in both]
    other = finished(source(dataclasses.replace(SETTINGS, segments=1), seed=1), 2)
    assert [whole[n] for n in both] != [other[n] for n in both]


def test_pools_rewards_and_groups():
    made = source()
    for step in range(4):
        before = copy.deepcopy(made.unfinished)
        found = made.next(PARAMS, step)
        assert all(len(a.tokens) % SETTINGS.segment == 0 and a.reward is None for a in made.unfinished)
        assert len(before) <= 16 and found["ids"].shape[0] == 16
        advantage = found["advantage"].reshape(4, 4)
        full = found["counted"].reshape(4, 4, -1).any((1, 2))
        np.testing.assert_allclose(advantage.mean(1), 0, atol=1e-6)
        np.testing.assert_allclose(advantage.std(1), full.astype(float), rtol=1e-5)  # no group of equal rewards
        for answer in made.experience:
            ended = answer.tokens[-1] == 0
            assert ended or len(answer.tokens) == SETTINGS.max_tokens
            assert answer.reward == (float(answer.tokens[0] == 2) if ended else 0.0)  # over-long: 0
            assert answer.ends[-1] == len(answer.tokens) and len(answer.versions) == len(answer.ends)


def train(folder, steps, kind=rollout.Rollouts, **changes):
    made = kind(MODEL, task(), SETTINGS, **changes)
    which = ulorl.recipe(ulorl.UloRL(MODEL), made, rate=0.3)
    begun = loop.init_state(jax.tree.map(jnp.array, PARAMS), which, jax.random.key(0))
    state = loop.train(which, begun, loop.LoopConfig(steps=steps, save_every=3, curve=False), folder)
    return state, made.state()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    return folder, *train(folder, 20)


def test_rewards_rise(learned):
    folder, state, _ = learned
    rewards = [row["reward"] for row in metrics.read(folder / "metrics.jsonl") if "reward" in row]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.25  # 0.03 and 0.43
    assert 0 <= rollout.accuracy(MODEL, state.params, task(), SETTINGS) <= 1


KILLED = """
    import os, signal, sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    from pathlib import Path
    from tests import test_train_ulorl as ours
    class Killed(ours.rollout.Rollouts):
        def next(self, params, step):
            if step == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().next(params, step)
    ours.train(Path(sys.argv[1]), 20, Killed)
"""


class Forgetful(rollout.Rollouts):
    """The planted bug: answers that were on their way are lost with the process."""

    def restore(self, state):
        super().restore({**state, "unfinished": []})


@pytest.mark.slow
def test_a_run_killed_with_sigkill_resumes_to_the_same_bits_pools_included(learned, tmp_path):
    folder, state, pools = learned
    told = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    ended = subprocess.run(told, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert loop.Checkpoints(tmp_path / "checkpoints").latest() == 12
    saved = loop.Checkpoints(tmp_path / "checkpoints").restore_source(12)
    assert saved["unfinished"], "the test needs answers on their way"
    again, same = train(tmp_path, 20)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    assert same == pools
    losses = [[row["loss"] for row in metrics.read(f / "metrics.jsonl") if "loss" in row] for f in (folder, tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_a_resumed_source_goes_on_with_the_same_answers():
    whole, cut = source(), source()
    for step in range(2):
        whole.next(PARAMS, step)
        cut.next(PARAMS, step)
    saved = json.loads(json.dumps(cut.state()))
    assert saved["unfinished"]
    resumed, forgetful = source(), Forgetful(MODEL, task(), SETTINGS)
    resumed.restore(saved)
    forgetful.restore(saved)
    want, found, wrong = (made.next(PARAMS, 2) for made in (whole, resumed, forgetful))
    jax.tree.map(np.testing.assert_array_equal, want, found)
    assert resumed.state() == whole.state()
    assert forgetful.state() != whole.state() or any((want[name] != wrong[name]).any() for name in want)


def test_nothing_to_train_on_is_an_update_of_nothing():
    made = source(task=task(lambda row, answer: 0.0))
    found = made.next(PARAMS, 0)
    assert not found["counted"].any() and all(answer.reward == 0 for answer in made.experience)
    loss, _ = ulorl.UloRL(MODEL)(PARAMS, found, None)
    assert float(loss) == 0


def test_bad_settings_rewards_and_states_are_told():
    for settings, said in (
        ({"samples": 1}, "samples: got 1, accepts an integer of 2"),
        ({"segments": 9}, "segments: got 9, accepts at most max_tokens, 6"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(SETTINGS, **settings)
    for settings, said in (
        ({"ratio": "grpo"}, "ratio: got 'grpo', accepts pois, sais"),
        ({"tau": 0.0}, "tau: got 0.0"),
        ({"sigma": -1.0}, "sigma: got -1.0"),
        ({"clip": (2.0, 0.1)}, "clip: got"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(ulorl.UloRL(MODEL), **settings)
    for reward, said in ((lambda row, answer: 2, "got 2, accepts"), (lambda row, answer: None, "got None, accepts")):
        with pytest.raises(JobError, match=said):
            source(task=task(reward)).next(PARAMS, 0)
    with pytest.raises(InputError, match="got token 4, but the model's vocabulary has 3 tokens"):
        rollout.Rollouts(toy.Markov(3), task(), SETTINGS)
    with pytest.raises(CheckpointError, match="damaged"):
        source().restore({"unfinished": [{"nummer": 1}]})
    with pytest.raises(JobError, match="not finite"):
        source().next({"table": PARAMS["table"] * jnp.nan}, 0)


def test_toys_and_prompts_from_a_file(tiny_model, tmp_path):
    assert rl_tasks.Toy("sort", 3).prompts[0]["prompt"][-1] == "="
    answers = {name: f("302" if name != "count" else "3") for name, f in rl_tasks.ANSWERS.items()}
    assert answers == {"copy": "302", "sort": "023", "count": "123"}
    made = rl_tasks.Toy("count").task()
    number = next(i for i, row in enumerate(made.prompts) if row["prompt"] == "3=")
    right = [rl_tasks.token_of(c) for c in "123"]
    assert made.score(number, right) == 1 and made.score(number, right[:2]) == 0
    rl_tasks.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("31=") == [rl_tasks.token_of(c) for c in "31="] and tokenizer.decode([4, 2, 0]) == "31"
    with pytest.raises(ConfigError, match="task: got 'add', accepts copy, sort, count"):
        rl_tasks.Toy("add")
    file, judge = tmp_path / "p.jsonl", "jaxinfer.train.rl_tasks:equals_answer"
    file.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "answer": "d"}\n')
    tokenizer = Tokenizer.load(tiny_model)
    own = rl_tasks.from_file(file, judge, tokenizer)
    assert own.score(1, tokenizer.encode("d")) == 1 and own.train.tolist() == [1] and own.held_out.tolist() == [0]
    for text, said in (
        ("{", "line 1: not JSON"),
        ('{"text": "a"}', "whose 'prompt' is a string"),
        ('{"prompt": ""}', "got a prompt of 0 tokens"),
        ('{"prompt": "a"}', "prompts: got 1, accepts 2 or more"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            rl_tasks.from_file(file, judge, tokenizer)
    for name, said in (("json", "module:function"), ("nosuch:f", "cannot be imported"), ("json:f", "no function f")):
        with pytest.raises(InputError, match=said):
            rl_tasks.function_of(name)
    with pytest.raises(InputError, match="No such file"):
        rl_tasks.from_file(tmp_path / "none", judge, tokenizer)


@pytest.mark.parametrize("more", [[], ["--task", "sort", "--reward", "a:b"], ["--prompts", "p.jsonl"]])
def test_the_command_line_wants_a_toy_or_a_reward(capsys, tmp_path, more):
    assert main(["train", "rl", "--output", str(tmp_path / "x"), *more]) == 2
    assert "a --task alone, or --prompts with --reward" in capsys.readouterr().err


@pytest.mark.slow
def test_the_toys_reward_rises(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "use_cache", lambda: None)
    told = "--steps 400 --max-tokens 6 --segments 2 --warmup 20".split()
    assert main(["train", "rl", "--task", "sort", "--output", str(tmp_path), *told]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reward"] > found["reward_before"] + 0.1


@pytest.mark.slow
def test_the_command_line_trains_a_toy_that_generates(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "use_cache", lambda: None)
    told = "--steps 4 --groups 8 --samples 8 --max-tokens 6 --segments 2 --warmup 30".split()
    assert main(["train", "rl", "--task", "sort", "--output", str(tmp_path), *told]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.3 < found["reward_before"] < 1 and found["reward"] > 0.3  # whether it rises takes more than four updates
    command = ["generate", "--model", str(tmp_path), "--prompt", "302=", "--max-tokens", "8", "--temperature", "0"]
    assert main(command) == 0
    assert set(capsys.readouterr().out.strip()) <= set(rl_tasks.CHARACTERS)
