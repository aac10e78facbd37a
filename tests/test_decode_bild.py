"""BiLD: plain greedy where no surprise is allowed, the small model's text where any is, and rows on their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Bild, Config, Features, Proposal, Rollback
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

OTHER = checks.MODEL.params(5, scale=0.5)
ALIKE = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, checks.PARAMS, OTHER)  # a small model that often agrees
DRAFT = checks.MARKOV.params(1, scale=1.2)


def test_with_no_surprise_allowed_bild_is_greedy():
    checks.Greedy(Bild(checks.MODEL, gamma=4, fallback=0.3, rollback=0.0), ALIKE).check()


def test_with_any_surprise_allowed_bild_is_the_small_models_text():
    """Every fifth token is the large model's own."""
    drafter = Bild(checks.MARKOV, gamma=4, fallback=0.0, rollback=1e9)
    run = toy.Run(checks.MARKOV, Config(max_tokens=15, drafter=drafter))
    tokens, lengths = toy.prompts(0, 3, 5, checks.SYMBOLS)
    got = run(checks.TABLE, tokens, lengths, draft_params=DRAFT)
    for row, start, length in zip(toy.outputs(got), np.asarray(tokens), np.asarray(lengths), strict=True):
        last = start[length - 1]
        for i, token in enumerate(row):
            table = checks.TABLE if i % 5 == 4 else DRAFT
            last = int(np.asarray(table["table"])[(length - 1 + i) % checks.MARKOV.period, last].argmax())
            assert token == last


def test_rollback_against_a_plain_reading():
    rng = np.random.default_rng(0)
    scores, drafts = rng.normal(size=(300, 5, 6)).astype(np.float32) * 2, rng.integers(0, 6, (300, 4)).astype(np.int32)
    valid = np.arange(4) < rng.integers(0, 5, 300)[:, None]
    rule = Rollback(1.5)
    verdict = rule.verify(jnp.asarray(scores), Proposal.of_chain(jnp.asarray(drafts), jnp.asarray(valid)), None)
    logp = np.asarray(jax.nn.log_softmax(scores))
    for row in range(300):
        n = 0
        while n < valid[row].sum() and (
            -logp[row, n, drafts[row, n]] <= 1.5 or drafts[row, n] == scores[row, n].argmax()
        ):
            n += 1
        assert int(verdict.n_accepted[row]) == n and int(verdict.next_token[row]) == scores[row, n].argmax()
        assert verdict.path[row].tolist() == [*range(n + 1), *[-1] * (4 - n)]


@dataclasses.dataclass(frozen=True)
class MixesRows(Bild):
    """Planted: as released, one row's confidence decides for the batch."""

    def propose(self, *args, **kwargs):
        proposal, state = super().propose(*args, **kwargs)
        return dataclasses.replace(proposal, valid=proposal.valid | proposal.valid.any(0)), state


def test_a_fallback_that_reads_the_whole_batch_is_caught():
    tokens, lengths = toy.prompts(0, 6, 5, checks.SYMBOLS)
    for kind, same in ((Bild, True), (MixesRows, False)):
        drafter = kind(checks.MARKOV, gamma=4, fallback=0.6, rollback=2.0)
        run = toy.Run(checks.MARKOV, Config(max_tokens=15, drafter=drafter))
        whole = toy.outputs(run(checks.TABLE, tokens, lengths, draft_params=DRAFT))
        alone = []
        for row in range(6):
            rows = np.full(6, row)
            alone.append(toy.outputs(run(checks.TABLE, tokens[rows], lengths[rows], draft_params=DRAFT))[0])
        assert (whole == alone) == same


def test_settings_and_rows_that_do_not_fit_are_refused():
    for given, message in (({"gamma": 0}, "gamma"), ({"fallback": 1.0}, "fallback"), ({"rollback": -1.0}, "rollback")):
        with pytest.raises(ConfigError, match=message):
            Bild(checks.MARKOV, **given)
    with pytest.raises(ConfigError, match="greedily"):
        Config(drafter=Bild(checks.MARKOV)).verifier_for(Features(sample=True), chain=True)
    with pytest.raises(ConfigError, match="tree"):
        tokens = jnp.zeros((1, 2), jnp.int32)
        tree = Proposal.of_tree(tokens, jnp.zeros((1, 2)), tokens >= 0, depth=1)
        Rollback().verify(jnp.zeros((1, 3, 4)), tree, None)
