"""Paired statistics: published worked examples, exact coverage and power, and the properties behind them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import fields
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from job.evaluation.statistics import (
    Comparison,
    compare,
    holm,
    mcnemar,
    minimum_detectable_effect,
    standard_error,
    tango_interval,
    verdict,
    wilson_interval,
)

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120)
probabilities = st.floats(min_value=0, max_value=1)


def pairs(both_right: int, improved: int, regressed: int, both_wrong: int) -> tuple[list[bool], list[bool]]:
    """The two lists of answers behind a table of counts."""
    base = [True] * both_right + [False] * improved + [True] * regressed + [False] * both_wrong
    adapter = [True] * (both_right + improved) + [False] * (regressed + both_wrong)
    return base, adapter


# compare ------------------------------------------------------------------------------------------------------------


def test_compare_agresti_approval_ratings() -> None:
    """Agresti's approval ratings (794/150/86/570) give his difference of -4 points, significant, from -5.9 to -2.1."""
    found = compare(*pairs(both_right=794, improved=86, regressed=150, both_wrong=570))
    assert (found.n, found.improved, found.regressed) == (1600, 86, 150)
    assert found.base == pytest.approx(0.59)
    assert found.adapter == pytest.approx(0.55)
    assert found.delta == pytest.approx(-0.04)
    assert found.ci95 == pytest.approx((-0.0590, -0.0214), abs=5e-5)
    assert found.mcnemar_p == pytest.approx(3.716e-05, abs=1e-8)  # R: binom.test(86, 86 + 150, 0.5)
    assert found.verdict == "regressed"


def test_compare_never_says_more_than_the_test() -> None:
    """Cavo et al. (2012): the interval excludes 0 but exact McNemar p is 0.0525, and the verdict is inconclusive."""
    found = compare(*pairs(both_right=59, improved=16, regressed=6, both_wrong=80))
    assert found.ci95[0] > 0
    assert found.verdict == "inconclusive"


def test_compare_calls_a_clear_gain_improved() -> None:
    """A gain that both test and interval support is called improved, and at a stricter alpha it is not."""
    answers_ = pairs(both_right=150, improved=40, regressed=20, both_wrong=90)
    assert compare(*answers_).verdict == "improved"
    strict = compare(*answers_, alpha=0.01)
    assert strict.verdict == "inconclusive"
    assert strict.ci95 == compare(*answers_).ci95
    assert strict.minimum_detectable_effect > compare(*answers_).minimum_detectable_effect


def test_compare_identical_answers() -> None:
    """Two models that agree on every question differ by 0 with p = 1, an interval around 0, and a finite effect."""
    found = compare([True, False] * 50, [True, False] * 50)
    assert (found.delta, found.mcnemar_p, found.verdict) == (0, 1, "inconclusive")
    assert found.ci95 == pytest.approx(
        (-3.8415 / 103.8415, 3.8415 / 103.8415), abs=1e-5
    )  # Wilson's interval of 0 / 100
    assert found.minimum_detectable_effect == pytest.approx(0.0779, abs=1e-4)


@pytest.mark.parametrize(("base", "adapter"), [([], []), ([True], []), ([True], [True, False])])
def test_compare_refuses_unpaired_answers(base: list[bool], adapter: list[bool]) -> None:
    """Lists that are empty or of different lengths are an error that tells both lengths."""
    with pytest.raises(ValueError, match=f"got {len(base)} and {len(adapter)} answers"):
        compare(base, adapter)


@given(answers)
def test_compare_is_antisymmetric(rows: list[tuple[bool, bool]]) -> None:
    """Swapping base and adapter negates the difference, mirrors interval and verdict, and keeps p and effect."""
    base, adapter = zip(*rows, strict=True)
    one, other = compare(base, adapter), compare(adapter, base)
    mirrored = {"improved": "regressed", "regressed": "improved", "inconclusive": "inconclusive"}
    assert (one.base, one.adapter) == (other.adapter, other.base)
    assert (one.improved, one.regressed) == (other.regressed, other.improved)
    assert one.delta == -other.delta
    assert one.ci95 == (-other.ci95[1], -other.ci95[0])
    assert one.mcnemar_p == other.mcnemar_p
    assert one.minimum_detectable_effect == other.minimum_detectable_effect
    assert one.verdict == mirrored[other.verdict]


@given(answers)
def test_compare_is_coherent(rows: list[tuple[bool, bool]]) -> None:
    """Every figure is a finite number in its range, the interval holds the difference, the verdict fits both."""
    base, adapter = zip(*rows, strict=True)
    found = compare(base, adapter)
    low, high = found.ci95
    assert found.base == sum(base) / len(base)
    assert found.adapter == sum(adapter) / len(adapter)
    assert found.delta == pytest.approx(found.adapter - found.base)
    assert -1 <= low <= found.delta <= high <= 1
    assert low < high
    assert 0 < found.mcnemar_p <= 1
    assert 0 < found.minimum_detectable_effect <= 1
    assert (found.verdict == "inconclusive") == (found.mcnemar_p >= 0.05 or low <= 0 <= high)
    assert all(math.isfinite(getattr(found, f.name)) for f in fields(Comparison) if f.type in {"int", "float"})


@given(answers, st.randoms(use_true_random=False))
def test_compare_ignores_the_order_of_questions(rows: list[tuple[bool, bool]], random: Random) -> None:
    """Shuffling the questions of both models together changes nothing."""
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert compare(*zip(*rows, strict=True)) == compare(*zip(*shuffled, strict=True))


@pytest.mark.parametrize(
    ("p", "ci95", "word"),
    [
        (0.049, (0.001, 0.1), "improved"),
        (0.05, (0.001, 0.1), "inconclusive"),
        (0.049, (0.0, 0.1), "inconclusive"),
        (0.049, (-0.1, -0.001), "regressed"),
        (0.049, (-0.1, 0.0), "inconclusive"),
    ],
)
def test_verdict_needs_test_and_interval(p: float, ci95: tuple[float, float], word: str) -> None:
    """A verdict other than inconclusive needs p below alpha and an interval wholly on that side of 0."""
    assert verdict(p, ci95) == word


# mcnemar ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("improved", "regressed", "p"),
    [
        (16, 6, 0.052479),  # Cavo et al. (2012), in R's contingencytables
        (12, 2, 0.0129),  # Armitage and Berry (1994), p. 127
        (6, 0, 2 / 2**6),
        (5, 5, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_published(improved: int, regressed: int, p: float) -> None:
    """Exact McNemar p values are the published ones, and 1 without discordant pairs."""
    assert mcnemar(improved, regressed) == pytest.approx(p, abs=5e-5)


# tango_interval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("improved", "regressed", "n", "level", "interval"),
    [
        (6, 16, 161, 0.95, (-0.1240, -0.0054)),  # Cavo et al. (2012), in R's contingencytables
        (1, 7, 21, 0.95, (-0.517, -0.026)),  # Bentur et al. (2009), in Fagerland, Lydersen and Laake (2014)
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),  # R: PropCIs::scoreci.mp(25, 28, 618, 0.9)
    ],
)
def test_tango_published(improved: int, regressed: int, n: int, level: float, interval: tuple[float, float]) -> None:
    """Intervals are those of published worked examples, to the digits they give."""
    digits = 3 if n == 21 else 4
    assert tuple(round(x, digits) for x in tango_interval(improved, regressed, n, level=level)) == interval


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 500), st.floats(0.5, 0.98))
def test_tango_nests_by_level(improved: int, regressed: int, concordant: int, level: float) -> None:
    """A higher confidence level gives an interval that contains the lower level's."""
    n = improved + regressed + concordant
    inner, outer = (
        tango_interval(improved, regressed, n, level=level),
        tango_interval(improved, regressed, n, level=0.99),
    )
    assert outer[0] < inner[0] < inner[1] < outer[1]


@pytest.mark.parametrize("n", [1, 2, 10, 2376])
def test_tango_when_all_change_one_way(n: int) -> None:
    """Where every question changes the same way, one bound is 1 and the other is not."""
    low, high = tango_interval(n, 0, n)
    assert high == 1
    assert low < 1
    assert tango_interval(0, n, n) == (-1, -low)


def exact_coverage(n: int, discordance: float, delta: float) -> float:
    """The probability that the 95 % interval holds `delta`, summed over all tables but some 1e-6 of them."""
    up, down = (discordance + delta) / 2, (discordance - delta) / 2
    improved = np.arange(binom.ppf(1e-7, n, up), binom.ppf(1 - 1e-7, n, up) + 1)
    regressed = np.arange(binom.ppf(1e-7, n, down), binom.ppf(1 - 1e-7, n, down) + 1)
    weights = binom.pmf(improved[:, None], n, up) * binom.pmf(regressed, n - improved[:, None], down / (1 - up))
    covered = 0.0
    for (i, b), (j, c) in itertools.product(enumerate(improved), enumerate(regressed)):
        low, high = tango_interval(int(b), int(c), n)
        covered += weights[i, j] * (low <= delta <= high)
    return covered


@pytest.mark.parametrize(
    ("n", "discordance", "delta"),
    [
        (100, 0.10, 0.0),
        (100, 0.10, 0.05),
        (100, 0.30, 0.10),
        (300, 0.02, 0.0139),
        (300, 0.05, 0.0),
        (300, 0.05, 0.02),
        pytest.param(300, 0.20, 0.10, marks=pytest.mark.long),
        (2376, 0.02, 0.0139),
        pytest.param(2376, 0.05, 0.0139, marks=pytest.mark.long),
    ],
)
def test_tango_exact_coverage(n: int, discordance: float, delta: float) -> None:
    """Over all possible outcomes, the 95 % interval holds the true difference in 95 +- 1 %."""
    assert exact_coverage(n, discordance, delta) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("discordance", "delta"), [(0.02, 0.0), (0.02, 0.0139), (0.02, 0.02), (0.05, 0.0), (0.05, 0.02), (0.05, 0.05)]
)
def test_tango_errs_to_the_wide_side_with_few_discordant_pairs(discordance: float, delta: float) -> None:
    """Where only two to five discordant pairs are expected, the 95 % interval still covers at least 94 %."""
    assert exact_coverage(100, discordance, delta) >= 0.94


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "discordance", "delta"),
    [(300, 0.30, 0.10), (2376, 0.05, 0.0139), (2376, 0.10, 0.0139), (2376, 0.30, 0.05)],
)
def test_tango_simulated_coverage(n: int, discordance: float, delta: float) -> None:
    """In 2,000 simulated runs the 95 % interval holds the true difference in 95 +- 1 %."""
    random = np.random.default_rng(20_260_101)
    shares = [(discordance + delta) / 2, (discordance - delta) / 2, 1 - discordance]
    held = 0
    for improved, regressed, _ in random.multinomial(n, shares, size=2000):
        low, high = tango_interval(int(improved), int(regressed), n)
        held += low <= delta <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.01)


# minimum_detectable_effect ------------------------------------------------------------------------------------------


def test_minimum_detectable_effect_published() -> None:
    """The exact power of 144 pairs at 45 % against 25 % is 0.80 in R's MESS, so 20 points are what they can detect."""
    assert minimum_detectable_effect(144, 101) == pytest.approx(0.20, abs=0.001)


@pytest.mark.parametrize(("n", "discordant"), [(300, 30), (300, 90), (2376, 48), (2376, 240), (2376, 700)])
def test_minimum_detectable_effect_connor(n: int, discordant: int) -> None:
    """It exceeds Connor's (1987) normal approximation, for the exact test is conservative, by less than 5 %."""
    z_alpha, z_beta, psi = 1.959964, 0.841621, discordant / n
    k = (z_alpha * math.sqrt(n) + z_beta * math.sqrt(n + z_beta**2 - z_alpha**2)) / (n + z_beta**2)
    connor = k * math.sqrt(psi)
    assert connor < minimum_detectable_effect(n, discordant) < 1.05 * connor


@pytest.mark.parametrize(("n", "discordant"), [(300, 30), (2376, 120), (2376, 0)])
def test_minimum_detectable_effect_has_its_power(n: int, discordant: int) -> None:
    """In 4,000 simulated runs with a true difference of that size, the exact test finds it in 80 +- 2 %."""
    delta = minimum_detectable_effect(n, discordant)
    discordance = max(discordant / n, delta)
    shares = [(discordance + delta) / 2, (discordance - delta) / 2, 1 - discordance]
    tables = np.random.default_rng(7).multinomial(n, shares, size=4000)
    unique, times = np.unique(tables, axis=0, return_counts=True)
    found = sum(t for (b, c, _), t in zip(unique, times, strict=True) if b > c and mcnemar(int(b), int(c)) < 0.05)
    assert found / 4000 == pytest.approx(0.80, abs=0.02)


@given(st.integers(6, 400), st.data())
def test_minimum_detectable_effect_is_monotone(n: int, data: st.DataObject) -> None:
    """A stricter alpha or a higher power never makes a smaller effect detectable."""
    discordant = data.draw(st.integers(0, n))
    found = minimum_detectable_effect(n, discordant)
    assert found <= minimum_detectable_effect(n, discordant, alpha=0.01) + 1e-9
    assert found <= minimum_detectable_effect(n, discordant, power=0.9) + 1e-9


def test_minimum_detectable_effect_of_too_few_questions() -> None:
    """Five questions can detect nothing (p is at least 1 / 16), six can."""
    assert minimum_detectable_effect(5, 2) == 1
    assert minimum_detectable_effect(6, 2) < 1


# holm and standard_error --------------------------------------------------------------------------------------------


def test_holm_textbook() -> None:
    """The textbook p values 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02, in their order."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(probabilities, min_size=1, max_size=6))
def test_holm_is_the_closed_bonferroni_test(p: list[float]) -> None:
    """Each adjusted p is the largest Bonferroni p of all families of hypotheses that contain it."""
    families = [f for size in range(1, len(p) + 1) for f in itertools.combinations(range(len(p)), size)]
    bonferroni = {f: min(1.0, len(f) * min(p[i] for i in f)) for f in families}
    assert holm(p) == pytest.approx([max(bonferroni[f] for f in families if i in f) for i in range(len(p))])


@given(st.lists(probabilities, max_size=10))
def test_holm_keeps_order_and_range(p: list[float]) -> None:
    """Adjusted p values are no smaller than the raw ones, at most 1, and ranked alike."""
    adjusted = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, adjusted, strict=True))
    ranked = [adjusted[i] for i in sorted(range(len(p)), key=p.__getitem__)]
    assert ranked == sorted(ranked)


@given(st.lists(st.booleans(), min_size=2, max_size=300))
def test_standard_error_is_lm_evals(correct: list[bool]) -> None:
    """The standard error is the one that lm-eval reports as acc_stderr."""
    from lm_eval.api.metrics import mean_stderr

    assert standard_error(correct) == pytest.approx(mean_stderr(correct), rel=1e-12)


@pytest.mark.parametrize("correct", [[], [True]])
def test_standard_error_needs_two_questions(correct: list[bool]) -> None:
    """Fewer than two questions have no standard error, and the message says so."""
    with pytest.raises(ValueError, match=f"at least two questions, got {len(correct)}"):
        standard_error(correct)


@pytest.mark.parametrize(
    ("right", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_interval_of_newcombes_table(right: int, n: int, interval: tuple[float, float]) -> None:
    """Method 3 in table I of R. G. Newcombe (1998), Statistics in Medicine 17, 857-872, to its four digits."""
    assert wilson_interval(right, n) == pytest.approx(interval, abs=5e-5)


@given(st.integers(1, 400), st.data())
def test_wilson_interval_holds_the_accuracy(n: int, data: st.DataObject) -> None:
    """Within 0 and 1, around the accuracy, and mirrored for wrong answers."""
    right = data.draw(st.integers(0, n))
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n <= high <= 1
    assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low))


def test_import_is_cheap() -> None:
    """Importing the module brings in neither scipy nor numpy."""
    code = "import sys, job.evaluation.statistics; print([m for m in ('numpy', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
