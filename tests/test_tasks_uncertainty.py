"""The bootstrap: coverage, form, speed."""

import time

import numpy as np
import pytest
from scipy.stats import binom

from tasks.metrics import resampling
from tasks.uncertainty import bootstrap


def resample_mean(values):
    return lambda rows: {"accuracy": float(values[rows].mean())}


def test_coverage_is_that_of_the_level():
    trials, covered, truth = 400, 0, 0.7
    generator = np.random.default_rng(1)
    for trial in range(trials):
        hits = generator.random(200) < truth
        low, high = bootstrap(resample_mean(hits), 200, num_resamples=300, seed=trial)["accuracy_ci95"]
        covered += low <= truth <= high
    # What 400 trials of a 95 % interval may give, with one point for the percentile method's known shortfall.
    low, high = binom.interval(0.999, trials, 0.94)
    assert low <= covered <= high


def test_width_is_that_of_the_normal_interval():
    hits = np.arange(1000) < 800
    low, high = bootstrap(resample_mean(hits), 1000)["accuracy_ci95"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.8 * 0.2 / 1000), rel=0.1)


def test_name_says_the_level_and_a_seed_gives_the_same_interval_again():
    hits = np.arange(50) < 30
    first = bootstrap(resample_mean(hits), 50, level=0.9, num_resamples=100, seed=3)
    state = np.random.get_state()[1].copy()
    assert first == bootstrap(resample_mean(hits), 50, level=0.9, num_resamples=100, seed=3)
    assert (np.random.get_state()[1] == state).all()
    assert list(first) == ["accuracy_ci90"]
    assert first != bootstrap(resample_mean(hits), 50, level=0.9, num_resamples=100, seed=4)


def test_undefined_resamples_are_left_out():
    draws = iter([1.0, np.nan, 1.0, np.nan])
    interval = bootstrap(lambda rows: {"m": next(draws)}, 5, num_resamples=4)
    assert interval == {"m_ci95": (1.0, 1.0)}


def test_ten_thousand_rows_take_seconds():
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(6, size=(2, 10_000))
    begin = time.perf_counter()
    bootstrap(resampling.single_label(predictions, references, labels=list("abcdef")), 10_000)
    bootstrap(resampling.regression(predictions, references), 10_000)
    assert time.perf_counter() - begin < 15
