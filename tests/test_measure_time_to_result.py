"""Time to result: the clock, the median of minima, and the profile's area against a numeric integral."""

import math

import numpy as np
import pytest

from jaxinfer.errors import InputError
from jaxinfer.measure import time_to_result as ttr

ROWS = [
    {"step": 1, "loss": 3.0, "total_seconds": 2.0},
    {"step": 2, "loss": 2.0, "total_seconds": 4.0},
    {"step": 2, "evaluation": {"bits": 1.4, "accuracy": 0.3}},
    {"step": 4, "loss": 1.0, "total_seconds": 9.0},
    {"step": 4, "evaluation": {"bits": 1.2, "accuracy": 0.6}},
    {"step": 6, "loss": 1.0, "total_seconds": 13.0},
    {"step": 6, "evaluation": {"bits": 1.25, "accuracy": 0.7}},
]


def test_the_first_evaluation_that_reaches_the_target_counts():
    assert ttr.time_to_result(ROWS, "bits", 1.4) == 4.0
    assert ttr.time_to_result(ROWS, "bits", 1.3) == 9.0
    assert ttr.time_to_result(ROWS, "bits", 1.1) == math.inf
    assert ttr.time_to_result(ROWS, "bits", 1.2, most=8.0) == math.inf
    assert ttr.time_to_result(ROWS, "accuracy", 0.65, larger=True) == 13.0
    with pytest.raises(InputError, match="accuracy, bits"):
        ttr.time_to_result(ROWS, "loss", 1.0)


def test_trials_compete_within_a_study_and_studies_by_their_median():
    assert ttr.of_studies([[5.0, 3.0], [math.inf, 9.0], [math.inf, math.inf]]) == 9.0
    assert ttr.of_studies([[5.0], [math.inf], [math.inf]]) == math.inf
    with pytest.raises(InputError, match="at least one"):
        ttr.of_studies([[1.0], []])


def test_the_score_is_the_area_under_the_profile():
    times = {
        "a": {"lm": 10.0, "flow": 30.0, "draft": math.inf, "none": math.inf},
        "b": {"lm": 25.0, "flow": 10.0, "draft": 7.0, "none": math.inf},
    }
    ratios = np.linspace(1, 4, 30_001)
    for method, score in ttr.scores(times).items():
        heights = [ttr.profile(times, ratio)[method] for ratio in ratios]
        np.testing.assert_allclose(score, np.trapezoid(heights, ratios) / 3, atol=1e-4)
    assert ttr.profile(times, 1.0) == {"a": 0.25, "b": 0.5}
    assert ttr.scores({"only": {"lm": 4.0}}) == {"only": 1.0}
    with pytest.raises(InputError, match="b has none for flow"):
        ttr.scores({"a": {"lm": 1.0, "flow": 2.0}, "b": {"lm": 1.0}})
