"""Draft training: losses and their limits, the target's answers, the reports, three stages that resume to the bit."""

import dataclasses
import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxinfer import decode
from jaxinfer.errors import CheckpointError, ConfigError, InputError, JobError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.step import Step
from jaxinfer.train import draft, draft_answers, draft_loss, draft_report, lm, loop
from jaxinfer.train.text import Text

VOCAB = 48
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32,
    max_length=64, tie_embeddings=True, eos=(0,),
)  # fmt: skip
TARGET = Step(CONFIG)
DRAFT = Step(draft.draft_config(CONFIG, layers=1, width=8))
ASKING = draft_answers.Asking(8, 6, 8, (0.0, 1.0), batch=4)
SETTINGS = draft.Settings(
    (("text", 4), ("code", 4), ("align", 4)), batch_tokens=64, length=16, rate=1e-2, loss="ce+kl", asking=ASKING
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Each run of the loop makes its program anew; here the same ones are read back."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for settings in (options, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is options:
            yield


def documents(seed: int, count: int = 6) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(1, VOCAB, 70).astype(np.int32) for _ in range(count))


TEXT = Text(documents(0), documents(1), documents(2), 500, 0, "toy")


@functools.cache
def target() -> draft.Model:
    params = jax.jit(TARGET.init)(jax.random.key(0))
    return draft.Model(TARGET, jax.tree.map(lambda leaf: np.asarray(leaf) * 4, params))  # far from uniform


@functools.cache
def _begun() -> dict:
    return jax.tree.map(np.asarray, jax.jit(draft.init_params, static_argnums=0)(DRAFT, 1))


def begun() -> draft.Model:
    return draft.Model(DRAFT, jax.tree.map(jnp.array, _begun()))  # training uses them up


def batch(rows: int = 3, length: int = 10, seed: int = 5) -> dict:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, (rows, length + 1)).astype(np.int32)
    zeros = np.zeros((rows, length), np.int32)
    positions = zeros + np.arange(length, dtype=np.int32)
    weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
    return {"ids": ids[:, :-1], "targets": ids[:, 1:], "segments": zeros, "positions": positions, "weights": weights}


def laws(seed: int) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(seed), (4, 5, 12))))


def check_divergences(divergences) -> None:
    """Both equal the sums that define them; fewer tokens tell less apart, and all of them everything."""
    p, q = laws(0), laws(1)
    kl, tv = divergences(p, q)
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(tv, 1 - np.minimum(np.exp(p), np.exp(q)).sum(-1), atol=1e-6)
    before = [np.zeros_like(kl), np.zeros_like(tv)]
    for k in (1, 2, 4, 8, 12):
        found = divergences(p, q, top_k=k)
        for low, mid, high in zip(before, found, (kl, tv), strict=True):
            assert (np.asarray(mid) >= low - 1e-5).all() and (np.asarray(mid) <= np.asarray(high) + 1e-5).all()
        before = [np.asarray(x) for x in found]
    np.testing.assert_allclose(before[0], kl, rtol=1e-4)


@pytest.mark.slow
def test_divergences_are_exact_at_full_width_and_lower_bounds_below():
    check_divergences(draft_loss.divergences)


def test_the_check_sees_laws_that_were_renormalised_or_exchanged():
    def renormalised(p, q, *, top_k=None):
        if top_k is None:
            return draft_loss.divergences(p, q)
        p, kept = jax.lax.top_k(p, top_k)
        q = jnp.take_along_axis(jnp.asarray(q), kept, -1)
        return draft_loss.divergences(jax.nn.log_softmax(p), jax.nn.log_softmax(q))

    for wrong in (renormalised, lambda p, q, **options: draft_loss.divergences(q, p, **options)):
        with pytest.raises(AssertionError):
            check_divergences(wrong)


@pytest.mark.slow
def test_a_token_that_the_target_rules_out_gives_a_finite_gradient():
    p = np.log(
        np.asarray([[0.5, 0.5, 0.0]], np.float32), where=[[True, True, False]], out=np.full((1, 3), -np.inf, "f")
    )
    for k in (None, 1, 2):
        kl, pull = jax.vjp(
            lambda x, k=k: draft_loss.divergences(p, jax.nn.log_softmax(x), top_k=k)[0], jnp.ones((1, 3))
        )
        assert np.isfinite(kl).all() and np.isfinite(pull(jnp.ones(1))[0]).all()


@pytest.mark.slow
def test_cross_entropy_is_the_language_model_loss_and_a_perfect_draft_has_nothing_to_learn():
    own, params = target(), begun().params
    part = {**batch(), "weights": np.ones((3, 10), np.float32)}

    @jax.jit
    def all_of(params, frozen):
        mixed = draft_loss.Distill(DRAFT, TARGET, 0.5, 0.5, top_k=4)
        perfect = draft_loss.Distill(TARGET, TARGET, 0.0, 1.0)
        return (
            lm.NextToken(DRAFT)(params, part, None)[0],
            draft_loss.Distill(DRAFT)(params, part, None),
            mixed(params, part, None, frozen),
            jax.value_and_grad(lambda p: perfect(p, part, None, frozen), has_aux=True)(frozen),
        )

    reference, (loss, told), (half, mixed), ((_, perfect), grads) = all_of(params, own.params)
    np.testing.assert_allclose(loss, reference, rtol=1e-6)
    assert float(told["weight"]) == 30 and set(mixed) == {"ce", "kl", "tv", "weight"}
    np.testing.assert_allclose(half, 0.5 * (mixed["ce"] + mixed["kl"]), rtol=1e-6)
    assert float(mixed["kl"]) > 0.1 and mixed["ce"] == told["ce"]
    assert abs(float(perfect["kl"])) < 1e-6 and abs(float(perfect["tv"])) < 1e-6
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-5


def test_what_weighs_nothing_changes_nothing():
    part, params = batch(), begun().params
    other = {**part, "targets": np.where(part["weights"] > 0, part["targets"], 1 + part["targets"] % (VOCAB - 1))}
    objective = jax.jit(draft_loss.Distill(DRAFT))
    assert float(objective(params, part, None)[0]) == float(objective(params, other, None)[0])
    assert float(objective(params, part, None)[0]) != float(
        objective(params, {**other, "weights": part["weights"] * 0 + 1}, None)[0]
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    own, folder = target(), tmp_path_factory.mktemp("answers")
    found = draft_answers.ask(own.step, own.params, TEXT.train, folder, ASKING, seed=3, identity="a")
    return folder, dataclasses.replace(found, rows=4)


@pytest.mark.slow
def test_greedy_answers_are_what_the_target_decodes_and_prompts_are_text(answers):
    _, found = answers
    own = target()
    greedy = np.arange(8) % 2 == 0
    config = decode.Config(max_tokens=8)
    prompts = found.tokens[greedy][:, :6]
    result = jax.jit(decode.generate, static_argnames=("step", "config"))(
        own.step, own.params, jnp.asarray(prompts), jnp.asarray(found.prompt_length[greedy]), config=config,
        key=jax.random.key(9),
    )  # fmt: skip
    for row, prompt, length, tokens, n in zip(
        found.tokens[greedy], found.prompt_length[greedy], found.length[greedy], np.asarray(result.tokens),
        np.asarray(result.lengths), strict=True,
    ):  # fmt: skip
        assert length == prompt + n
        np.testing.assert_array_equal(row[prompt:length], tokens[:n])
        assert any(row[:prompt].tobytes() in document.tobytes() for document in TEXT.train)
    sampled = found.tokens[~greedy]
    assert len({row.tobytes() for row in sampled}) == len(sampled)


def test_answers_resume_to_the_same_and_damaged_parts_are_made_again(answers):
    folder, found = answers
    own = target()
    files = sorted(folder.rglob("part-*.npz"))
    kept = files[0].stat().st_mtime_ns
    files[1].write_bytes(files[1].read_bytes()[:50])
    ask = lambda **changes: draft_answers.ask(  # noqa: E731
        own.step, own.params, TEXT.train, folder, ASKING, **{"seed": 3, "identity": "a", **changes}
    )
    assert ask().digest() == found.digest()
    assert files[0].stat().st_mtime_ns == kept
    assert ask(seed=4).digest() != found.digest()  # and of another identity nothing is read
    ask(identity="b")
    assert len(list(folder.iterdir())) == 3


def test_a_batch_is_a_function_of_the_step_and_counts_answers_alone(answers):
    _, found = answers
    first, second, third = (found(i) for i in range(3))
    rows = sorted(map(bytes, np.concatenate([first["ids"], second["ids"]])))
    assert rows == sorted(map(bytes, found.tokens[:, :-1]))  # a pass holds each row once
    assert not np.array_equal(first["ids"], third["ids"]) and found(2)["ids"].tobytes() == third["ids"].tobytes()
    for row, weights in zip(first["ids"], first["weights"], strict=True):
        [which] = np.flatnonzero((found.tokens[:, :-1] == row).all(1))
        prompt, length = found.prompt_length[which], found.length[which]
        np.testing.assert_array_equal(np.flatnonzero(weights), np.arange(prompt - 1, length - 1))
    half = dataclasses.replace(found, prompt_weight=0.5)(0)["weights"]
    assert (half[:, : ASKING.prompt_tokens - 1] == 0.5).all()


@pytest.mark.slow
def test_the_report_of_a_perfect_draft_and_of_another(monkeypatch):
    own = target()
    measuring = draft_report.Measuring(4, 8, 9, 16, gamma=2)
    found = draft_report.report(own.step, own.params, own.step, own.params, TEXT.held_out, measuring)
    assert found["expected_acceptance"] == pytest.approx(1, abs=1e-5)
    assert found["greedy_acceptance"] == found["sampled_acceptance"] == 1
    assert found["greedy_block_efficiency"] == 3  # gamma and the target's own
    assert found["greedy_memory_bound_speedup"] == pytest.approx(1)  # as many bytes a draft as the target
    small = begun()
    expected = draft_report.expected(own.step, own.params, small.step, small.params, np.stack(TEXT.held_out)[:2, :16])
    part = {"ids": np.stack(TEXT.held_out)[:2, :16], "segments": np.zeros((2, 16), np.int32)}
    part["positions"] = part["segments"] + np.arange(16, dtype=np.int32)
    logits_of = jax.jit(draft_loss.logits_of, static_argnums=0)
    p, q = (jax.nn.softmax(logits_of(m.step, m.params, part)) for m in (own, small))
    assert expected == pytest.approx(float(jnp.minimum(p, q).sum(-1).mean()), abs=1e-5) and expected < 0.9


def test_rates_count_the_drafts_that_the_verifier_came_to():
    counts = {"proposed_by_depth": jnp.asarray([[4, 4, 4]]), "accepted_by_depth": jnp.asarray([[3, 2, 1]])}
    stats = decode.Stats(jnp.asarray([4]), jnp.asarray([10]), **counts)
    assert draft_report.rates(stats) == (pytest.approx(6 / 9), 2.5)  # came to 4, 3 and 2


def run(folder, *, settings=SETTINGS, text=TEXT, **options):
    return draft.train_draft(
        target(), begun(), text, settings, folder, loop_config={"curve": False, "save_every": 2}, **options
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    params, _ = run(folder)
    return loop.fingerprint(params), losses(folder)


def losses(folder) -> list[float]:
    return [
        row["loss"] for stage in draft.STAGES for row in loop.record.read(folder / stage / "metrics.jsonl")
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Trap(Text):
    """Calls `spring` when the stage with this share of rows from code is asked for the batch of update `at`."""

    share: float = 0.0
    at: int = 3
    spring: Callable[[], None] = print

    def stream(self, stages, **options):
        inner = super().stream(stages, **options)

        def batches(step):
            if stages[0].weight == self.share and step == self.at:
                self.spring()
            return inner(step)

        return batches


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, SETTINGS.code_share])
def test_a_run_stopped_in_any_stage_ends_in_the_same_bits(undisturbed, tmp_path, share):
    fields = {field.name: getattr(TEXT, field.name) for field in dataclasses.fields(Text)}
    trap = Trap(**fields, share=share, at=2, spring=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Preempted, match="after step 3"):
        run(tmp_path, text=trap)
    params, _ = run(tmp_path)
    assert (loop.fingerprint(params), losses(tmp_path)) == undisturbed


@pytest.mark.slow
def test_a_run_killed_with_sigkill_in_alignment_ends_in_the_same_bits(undisturbed, tmp_path):
    script = textwrap.dedent("""
        import importlib.util, os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_default_matmul_precision", "highest")
        spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
        toy = sys.modules["toy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(toy)
        whole = toy.draft_answers.Answers.__call__
        def batches(self, step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, step)
        toy.draft_answers.Answers.__call__ = batches
        toy.run(__import__("pathlib").Path(sys.argv[2]))
    """)
    killed = subprocess.run([sys.executable, "-c", script, __file__, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert loop.Checkpoints(tmp_path / "align/checkpoints").latest() == 2
    params, _ = run(tmp_path)
    assert (loop.fingerprint(params), losses(tmp_path)) == undisturbed


@pytest.mark.slow
def test_other_settings_are_refused_and_no_resume_begins_again(undisturbed, tmp_path):
    short = dataclasses.replace(SETTINGS, stages=(("text", 4),))
    run(tmp_path, settings=short)
    with pytest.raises(ConfigError, match="another run .*rate: saved 0.01, now 0.02"):
        run(tmp_path, settings=dataclasses.replace(short, rate=2e-2))
    run(tmp_path, settings=dataclasses.replace(short, rate=2e-2), resume=False)
    with pytest.raises(ConfigError, match="another run"):
        run(tmp_path, settings=short)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    fields = {field.name: getattr(TEXT, field.name) for field in dataclasses.fields(Text)}
    short = dataclasses.replace(SETTINGS, stages=(("text", 4),))

    def broken():
        raise JobError("stop")

    with pytest.raises(JobError, match="stop"):
        run(tmp_path, settings=short, text=Trap(**fields, spring=broken))
    checkpoints = loop.Checkpoints(tmp_path / "text/checkpoints")
    assert checkpoints.latest() == 2
    small = begun()
    bad = dataclasses.replace(small, params=jax.tree.map(lambda x: x * jnp.nan, small.params))
    with pytest.raises(JobError, match="the loss is nan at step 1"):
        draft.train_draft(target(), bad, TEXT, short, tmp_path / "nan", loop_config={"curve": False})
    assert loop.Checkpoints(tmp_path / "nan/text/checkpoints").latest() is None


# A restore that fails leaves Orbax's coroutines on a closed loop; they complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(undisturbed, tmp_path):
    run(tmp_path)
    newest = tmp_path / "align/checkpoints/4"
    for file in newest.rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        CheckpointError, match=r"step 4 below .*align/checkpoints.* is damaged: .*go on from the one of step 2"
    ):
        run(tmp_path)
    gc.collect()  # here and not in another test
    shutil.rmtree(newest)
    params, _ = run(tmp_path)
    assert (loop.fingerprint(params), losses(tmp_path)) == undisturbed


def test_vocabularies_that_differ_are_refused():
    other = Step(dataclasses.replace(CONFIG, vocab_size=VOCAB + 1))
    with pytest.raises(ConfigError, match=f"got a vocabulary of 49 tokens, accepts the target's, {VOCAB}"):
        draft.train_draft(target(), draft.Model(other, {}), TEXT, SETTINGS, "nowhere")
    with pytest.raises(InputError, match="no document of two tokens"):
        draft_answers.ask(TARGET, {}, [np.ones(1, np.int32)], "/tmp", ASKING, seed=0, identity="")


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        (draft.Settings, {"stages": (("align", 9), ("text", 9))}, "stages"),
        (draft.Settings, {"stages": (("text", 1),)}, "1 updates of text"),
        (draft.Settings, {"loss": "mse"}, "loss"),
        (draft.Settings, {"copies": 2.0}, "copies"),
        (draft.Settings, {"length": 100}, "batch_tokens"),
        (draft.Settings, {"rate": 0.0}, "rate"),
        (draft_answers.Asking, {"count": 0}, "count"),
        (draft_answers.Asking, {"temperatures": (-1.0,)}, "temperatures"),
        (draft_report.Measuring, {"gamma": 0}, "gamma"),
        (draft_report.Measuring, {"temperature": 0.0}, "temperature"),
        (draft_loss.Distill, {"step": DRAFT, "kl": 1.0}, "target: got None"),
        (draft_loss.Distill, {"step": DRAFT, "ce": 0.0}, "ce, kl, tv"),
        (draft_loss.Distill, {"step": DRAFT, "top_k": 99}, "top_k"),
    ],
)
def test_bad_settings_are_refused(kind, changes, named):
    with pytest.raises(ConfigError, match=named):
        kind(**changes)


def test_a_draft_takes_after_its_target():
    from jaxinfer.ops.position import Rope

    wide = dataclasses.replace(
        CONFIG, hidden_size=64, num_heads=8, num_kv_heads=4, mlp_size=192, num_layers=4, embedding_scale=8.0,
        windows=(4, None, 4, None), ropes=tuple(Rope(8, theta=float(i + 1)) for i in range(4)),
    )  # fmt: skip
    small = draft.draft_config(wide, layers=2, width=48)
    assert (small.num_heads, small.num_kv_heads, small.head_dim, small.mlp_size) == (6, 3, 8, 144)
    assert small.windows == (None, None) and [rope.theta for rope in small.ropes] == [2, 4]
    assert small.embedding_scale == pytest.approx(48**0.5)
    experts = dataclasses.replace(
        wide, family="mixtral", num_experts=4, experts_per_token=2, expert_size=64, mlp_size=0, embedding_scale=None
    )
    dense = draft.draft_config(experts, layers=1, width=32)
    assert (dense.family, dense.num_experts, dense.mlp_size) == ("mistral", 0, 64)
    assert jax.eval_shape(Step(dense).init, jax.random.key(0))["embedding"].shape == (VOCAB, 32)
    for changes in ({"layers": 5, "width": 32}, {"layers": 1, "width": 65}):
        with pytest.raises(ConfigError):
            draft.draft_config(wide, **changes)
