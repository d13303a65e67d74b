"""Paired statistics of two models on the same questions.

Only questions that exactly one of the two models answers right (discordant pairs) say something about their difference:
`improved` ones (wrong before, right after) and `regressed` ones. Every function is a pure function of counts, so all
figures can be computed again from the published samples.

| figure | method |
|---|---|
| p value of a difference | McNemar's exact test (1947) |
| 95 % interval of a difference | Tango's score interval (1998) |
| smallest difference the test can detect | exact power of McNemar's test, Duffy (1984) |
| p value of a difference above a margin | one-sided McNemar at 0, else Tango's score test (1998) |
| difference of averages and perplexities | paired t test of a ratio of sums, Cochran (1977) |
| difference of averages over several tasks | t test of a stratified mean, Cochran (1977) |
| several tasks at once | Holm's step-down adjustment (1979) |
| interval of one accuracy | Wilson's score interval (1927) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

# Solving for a bound takes up to 50 ms, and a run compares the same counts in its manifest, report and verification.
_of_same_counts = lru_cache(maxsize=1024)

Verdict = Literal["improved", "regressed", "inconclusive"]


@dataclass(frozen=True)
class Comparison:
    """One metric on one task, adapter against base, paired by question. Accuracies and differences are fractions."""

    n: int
    base: float
    adapter: float
    delta: float  # adapter - base
    improved: int
    regressed: int
    ci95: tuple[float, float]  # of delta
    mcnemar_p: float
    minimum_detectable_effect: float
    verdict: Verdict


def compare(base: Sequence[bool], adapter: Sequence[bool], *, alpha: float = 0.05) -> Comparison:
    """Compare two models on the same questions.

    Args:
        base: One entry a question, true where the base model is right.
        adapter: The same questions in the same order, for the adapter.
        alpha: Level of the two-sided test behind the verdict and the minimum detectable effect. The interval is 95 %
            for every alpha.

    Raises:
        ValueError: The lists differ in length or are empty.
    """
    n = len(base)
    if n == 0 or len(adapter) != n:
        raise ValueError(f"a paired comparison needs the same questions twice, got {n} and {len(adapter)} answers")
    improved = sum(1 for before, after in zip(base, adapter, strict=True) if after and not before)
    regressed = sum(1 for before, after in zip(base, adapter, strict=True) if before and not after)
    right_before = sum(1 for before in base if before)
    ci95 = tango_interval(improved, regressed, n)
    p = mcnemar(improved, regressed)
    return Comparison(
        n=n,
        base=right_before / n,
        adapter=(right_before + improved - regressed) / n,
        delta=(improved - regressed) / n,
        improved=improved,
        regressed=regressed,
        ci95=ci95,
        mcnemar_p=p,
        minimum_detectable_effect=minimum_detectable_effect(n, improved + regressed, alpha=alpha),
        verdict=verdict(p, ci95, alpha=alpha),
    )


def verdict(p: float, ci95: tuple[float, float], *, alpha: float = 0.05, higher_is_better: bool = True) -> Verdict:
    """The verdict: significant at `alpha`, with an interval that excludes 0; otherwise "inconclusive".

    With several tasks, pass the p value adjusted by `holm`: the verdicts then hold for all tasks at once.
    """
    low, high = ci95 if higher_is_better else (-ci95[1], -ci95[0])
    if p < alpha and low > 0:
        return "improved"
    if p < alpha and high < 0:
        return "regressed"
    return "inconclusive"


@_of_same_counts
def mcnemar(improved: int, regressed: int) -> float:
    """Exact two-sided p value of McNemar's test; 1 if there are no discordant pairs.

    Without a difference, `improved` of the discordant pairs is binomial with probability 1/2: Q. McNemar (1947), Note
    on the sampling error of the difference between correlated proportions or percentages, Psychometrika 12, 153-157.
    """
    if improved + regressed == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(improved, improved + regressed, 0.5).pvalue)


@_of_same_counts
def tango_interval(improved: int, regressed: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of the difference between two paired proportions, (improved - regressed) / n.

    It contains every difference that the score test does not reject, where the share of regressed questions is its
    maximum likelihood estimate under that difference: T. Tango (1998), Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design, Statistics in Medicine 17, 891-908.

    Chosen by exact coverage, summed over all possible tables for n of 100, 300, 1000 and 2376, discordance of 2 to
    30 % and differences of 0 to 10 points. Where six or more discordant pairs are expected, the 95 % interval covers
    95 +- 1 % (but 93.6 % at n = 100 where ten of ten go one way); with two it is wide, up to 99.4 %. There Wald and
    Agresti and Min fall to 82 and 87 %, and with six pairs Bonett and Price and Newcombe's method 10 still cover up to
    98.7 %. The bounds stay within -1 and 1, and concordant counts are not needed.

    Args:
        improved: Questions wrong before and right after.
        regressed: Questions right before and wrong after.
        n: All questions, concordant ones included.
        level: Confidence level, a fraction.

    Returns:
        Lower and upper bound, fractions of the questions.
    """
    upper = _tango_upper(improved / n, regressed / n, n, level)
    # The lower bound is the upper bound of the opposite comparison. Computed like this, A against B and B against A
    # give exactly mirrored intervals, not only up to the solver's tolerance.
    return -_tango_upper(regressed / n, improved / n, n, level), upper


def _tango_upper(improved: float, regressed: float, n: int, level: float) -> float:
    from scipy.optimize import brentq
    from scipy.stats import norm

    z_squared = norm.ppf((1 + level) / 2) ** 2
    delta = improved - regressed

    def excess(theta: float) -> float:
        """The squared score statistic at `theta` minus its critical value; both times the variance, which may be 0."""
        return float((delta - theta) ** 2 - z_squared * _variance(improved, regressed, theta) / n)

    # At the estimate itself the variance may be 0 (no discordant pairs), which is a root but not the bound.
    inside = delta + 1e-9
    return 1.0 if inside >= 1 else float(brentq(excess, inside, 1.0, xtol=1e-14))


def _variance(improved: float, regressed: float, theta: float) -> float:
    """Variance of one question's difference if the true one is `theta`; `improved` and `regressed` are fractions."""
    linear = (2 - (improved - regressed)) * theta - improved - regressed
    root = float(max(0.0, linear**2 + 8 * regressed * theta * (1 - theta)) ** 0.5)  # below 0 only by rounding
    regressed_at_theta = (root - linear) / 4
    return 2 * regressed_at_theta + theta * (1 - theta)


def one_sided_p(improved: int, regressed: int, n: int, margin: float) -> float:
    """P value of "the true difference is at most `margin`": small where it is shown to be larger.

    At a margin of 0 the exact test of McNemar (1947), one-sided; elsewhere Tango's score test (1998), which his
    interval inverts: the p value is below 2.5 % where the margin is below the lower bound of the 95 % interval.

    Args:
        improved: Questions wrong before and right after.
        regressed: Questions right before and wrong after.
        n: All questions, concordant ones included.
        margin: A fraction of the questions.
    """
    from scipy.stats import binom, norm

    if margin == 0:
        return float(binom.sf(improved - 1, improved + regressed, 0.5))
    excess = (improved - regressed) / n - margin
    variance = _variance(improved / n, regressed / n, margin) / n
    if variance <= 0:  # such differences cannot occur if the true one is the margin
        return 1.0 if excess <= 0 else 0.0
    return float(norm.sf(excess / variance**0.5))


@_of_same_counts
def minimum_detectable_effect(n: int, discordant: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that the exact McNemar test calls significant with probability `power`.

    The power is exact, not a normal approximation: with D ~ Bin(n, psi) discordant pairs, of which
    Bin(D, (1 + delta / psi) / 2) are in the direction of the effect, it is the probability of `mcnemar` < alpha, by
    S. W. Duffy (1984), Asymptotic and exact power for the McNemar test and its analogue with R controls per case,
    Biometrics 40, 1005-1015, and DIST=EXACT_COND of SAS's PROC POWER. The function solves it for delta.

    The share of discordant pairs, psi, is the observed one, but at least delta: a difference needs that many discordant
    pairs. So the result is meaningful even without discordant pairs: about 8 / n, all in one direction.

    Args:
        n: Number of questions.
        discordant: How many of them the two models answered differently.
        alpha: Level of the two-sided test.
        power: Probability of a significant result.

    Returns:
        A fraction of the questions; 1 where not even the largest difference could be detected (fewer than six
        questions at alpha 0.05).
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import binom

    pairs = np.arange(n + 1)
    # At most this many may go against the effect: the largest count whose lower tail is within alpha / 2, else -1.
    against = binom.ppf(alpha / 2, pairs, 0.5) - 1

    def shortfall(delta: float) -> float:
        discordance = max(discordant / n, delta)
        share_against = (1 - delta / discordance) / 2
        detected = binom.cdf(against, pairs, share_against)
        return float(power - np.sum(binom.pmf(pairs, n, discordance) * detected))

    return 1.0 if shortfall(1.0) > 0 else float(brentq(shortfall, 1 / n, 1.0, xtol=1e-12))


def paired_ratio(
    differences: Sequence[float], weights: Sequence[float], *, level: float = 0.95
) -> tuple[float, tuple[float, float], float]:
    """The ratio R of the sums of paired differences d and of weights w: estimate, interval, two-sided p value of R = 0.

    Its variance is n / (n - 1) * sum((d - R w)^2) / sum(w)^2: W. G. Cochran (1977), Sampling Techniques, third edition,
    section 6.4, for a sample of an infinite population. With equal weights this is the paired t test. Interval and p
    value are by Student's t with n - 1 degrees of freedom.

    Args:
        differences: One for each question: after less before.
        weights: Weights of the same questions; above 0.
        level: Confidence level, a fraction.
    """
    from math import fsum

    n, total = len(differences), fsum(weights)
    ratio = fsum(differences) / total
    spread = fsum((d - ratio * w) ** 2 for d, w in zip(differences, weights, strict=True))
    return _by_t(ratio, (n / (n - 1) * spread) ** 0.5 / total, n - 1, level)


@dataclass(frozen=True)
class Stratified:
    """A mean over strata: its estimate, interval, two-sided p value of a mean of 0, and degrees of freedom."""

    delta: float
    ci95: tuple[float, float]
    p: float
    freedom: float


def stratified(differences: Sequence[Sequence[float]], shares: Sequence[float]) -> Stratified:
    """A mean over strata of the means of paired differences, by Student's t.

    Its variance is the sum of share^2 * s^2 / n over the strata, and its degrees of freedom are Satterthwaite's, since
    a stratum of few questions may make up most of the variance: W. G. Cochran (1977), Sampling Techniques, third
    edition, sections 5.3 and 5.4. Two strata with shares of 1/2 give Welch's test.

    Where all answers of a stratum are right or wrong, half a question is added to each cell of its table of pairs: A.
    Agresti and Y. Min (2005), Simple improved confidence intervals for comparing matched proportions, Statistics in
    Medicine 24, 729-740. Without it, a few questions that all changed alike would count as known without error.

    Args:
        differences: For each stratum, the differences (after less before); at least two.
        shares: Weight of each stratum in the mean; they add up to 1.
    """
    from math import fsum

    means, squares, freedoms = zip(*(_stratum(stratum) for stratum in differences), strict=True)
    parts = [share**2 * square for share, square in zip(shares, squares, strict=True)]
    variance, centre = fsum(parts), fsum(share * mean for share, mean in zip(shares, means, strict=True))
    delta = fsum(share * fsum(d) / len(d) for share, d in zip(shares, differences, strict=True))
    if variance == 0:  # all equal in each stratum, so their spread is unknown
        return Stratified(delta, (delta, delta), 1.0, float(sum(freedoms)))
    freedom = variance**2 / fsum(part**2 / own for part, own in zip(parts, freedoms, strict=True))
    _, interval, p = _by_t(centre, variance**0.5, freedom, 0.95)
    return Stratified(delta, interval, p, freedom)


def _stratum(differences: Sequence[float]) -> tuple[float, float, int]:
    """Mean, variance of the mean, and degrees of freedom."""
    from math import fsum

    n, total = len(differences), fsum(differences)
    if {*differences} <= {-1.0, 0.0, 1.0}:
        n += 2
        mean = total / n
        return mean, ((sum(map(abs, differences)) + 1) / n - mean**2) / n, n - 1
    mean = total / n
    return mean, fsum((d - mean) ** 2 for d in differences) / (n - 1) / n, n - 1


def _by_t(estimate: float, error: float, freedom: float, level: float) -> tuple[float, tuple[float, float], float]:
    """Estimate, interval and two-sided p value by Student's t."""
    from scipy.stats import t

    if error == 0:  # all alike: without a difference nothing is shown, and with one only that it is the same everywhere
        return estimate, (estimate, estimate), 1.0 if estimate == 0 else 0.0
    half = float(t.ppf((1 + level) / 2, freedom)) * error
    return estimate, (estimate - half, estimate + half), float(2 * t.sf(abs(estimate) / error, freedom))


def holm(p: Sequence[float]) -> list[float]:
    """P values adjusted by Holm's step-down method: compared with alpha, they keep the family-wise error at alpha.

    S. Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6,
    65-70. The order of the input is kept.
    """
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def standard_error(correct: Sequence[bool]) -> float:
    """Standard error of an accuracy, as lm-eval's `acc_stderr`: the sample standard deviation over sqrt(n).

    Raises:
        ValueError: Fewer than two questions, which have no sample standard deviation.
    """
    n = len(correct)
    if n <= 1:
        raise ValueError(f"a standard error needs at least two questions, got {n}")
    accuracy = sum(1 for right in correct if right) / n
    return float((accuracy * (1 - accuracy) / (n - 1)) ** 0.5)


def wilson_interval(correct: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one accuracy; always within 0 and 1.

    E. B. Wilson (1927), Probable inference, the law of succession, and statistical inference, Journal of the American
    Statistical Association 22, 209-212. Whether two of these overlap says little about paired accuracies: use
    `tango_interval` for a difference.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)
