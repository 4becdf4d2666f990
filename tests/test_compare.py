"Intervals, verdicts and McNemar's test, against scipy and against counting by hand."

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from scipy import stats

from sota_course.training.compare import compare, detectable, interval, mcnemar, power_of, welch
from sota_course.training.runs import Result, load_results

ACCURACIES = st.lists(st.integers(0, 1000).map(lambda o: o / 1000), min_size=2, max_size=6)


def results(name, accuracies, seeds=None, seconds=10.0, history=(), **config):
    seeds = range(len(accuracies)) if seeds is None else seeds
    return [
        Result(name, seed, config, list(history), acc, 1.0, 0.1, seconds, 1.0)
        for seed, acc in zip(seeds, accuracies)
    ]


# ---- intervals -----------------------------------------------------------------------------------


@given(ACCURACIES, ACCURACIES, st.sampled_from([0.8, 0.95, 0.99]))
def test_welch_is_scipys(a, b, confidence):
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    ci = stats.ttest_ind(b, a, equal_var=False).confidence_interval(confidence)
    middle, half = np.mean(b) - np.mean(a), welch(a, b, confidence)
    assert ci.low == pytest.approx(middle - half, abs=1e-9)
    assert ci.high == pytest.approx(middle + half, abs=1e-9)


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 2), min_size=2, max_size=6))
def test_pairs_are_scipys(pairs):
    a, b = np.array(pairs).T / 1000
    assume(np.std(b - a) > 1e-9)
    row = compare(results("a", a), results("b", b)).table.loc["b"]
    ci = stats.ttest_rel(b, a).confidence_interval()
    assert ci.low == pytest.approx(row.paired_difference - row.paired, abs=1e-9)
    assert ci.high == pytest.approx(row.paired_difference + row.paired, abs=1e-9)


@given(ACCURACIES, ACCURACIES)
def test_a_verdict_and_welchs_test_agree(a, b):
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    p = stats.ttest_ind(b, a, equal_var=False).pvalue
    assume(abs(p - 0.05) > 1e-6)
    said = compare(results("a", a), results("b", b)).verdict("b")
    assert ("can't be told apart" in said) == (p > 0.05)


def test_the_interval_of_a_mean_is_scipys():
    x = [0.5, 0.52, 0.57, 0.49]
    ci = stats.ttest_1samp(x, 0).confidence_interval()
    row = compare(results("x", x)).table.iloc[0]
    assert row.interval == interval(x) == pytest.approx((ci.high - ci.low) / 2)
    assert row.sd == pytest.approx(np.std(x, ddof=1))


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (3000, 3)), rng.normal(0.5, 2, (3000, 5))
    held = [abs(y.mean() - x.mean() - 0.5) <= welch(x, y) for x, y in zip(a, b)]
    assert 0.93 < np.mean(held) < 0.975


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("power", [0.3, 0.8])
def test_power_is_how_often_a_difference_is_shown(n, power):
    difference = detectable(n, 0.02, power)
    rng = np.random.default_rng(n)
    a = rng.normal(0.5, 0.02, (20_000, n))
    b = rng.normal(0.5 + difference, 0.02, (20_000, n))
    found = stats.ttest_ind(b, a, axis=1).pvalue < 0.05
    assert np.mean(found) == pytest.approx(power, abs=0.012)
    welchs = np.mean(stats.ttest_ind(b, a, axis=1, equal_var=False).pvalue < 0.05)
    assert welchs <= np.mean(found) + 0.002
    assert n < 5 or welchs > power - 0.04


def test_power_of_differences_large_and_small():
    curve = [power_of(o, 3, 1.0) for o in np.linspace(0, 60, 300)]
    assert curve[0] == pytest.approx(0.05)
    assert np.diff(curve).min() > -1e-9
    assert curve[-1] == pytest.approx(1)
    assert power_of(-1.3, 4, 1) == power_of(1.3, 4, 1)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: power_of(0.1, 1, 0.1),
        lambda: power_of(0.1, 3, 0),
        lambda: power_of(0.1, 3, math.nan),
        lambda: detectable(3, 0.1, 0.05),
        lambda: detectable(3, 0.1, 1.0),
    ],
)
def test_power_refuses(bad):
    with pytest.raises(ValueError, match="power"):
        bad()


# ---- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("data", "woof"),
        ("split", "random 0.2, seed 42"),
        ("size", 32),
        ("n_train", 5),
        ("n_valid", 5),
        ("classes", 4),
    ],
)
def test_no_verdict_on_other_ground(setting, other):
    ground = dict(data="nette", split="official", size=64, n_train=9, n_valid=8, classes=10)
    a = results("a", [0.5, 0.6, 0.7], **ground)
    b = results("b", [0.8, 0.9, 1.0], **ground | {setting: other})
    c = results("c", [0.5, 0.6, 0.8], **ground | dict(lr=1))
    three = compare(a, b, c)
    assert three.obstacles("b") == [setting] and three.obstacles("c") == []
    assert three.table.loc["b", ["difference", "welch", "paired_difference", "paired"]].isna().all()
    assert list(three.formatted().loc["b"].iloc[-2:]) == ["not comparable"] * 2
    assert "not comparable" in three._repr_html_()
    said = three.verdict("b")
    assert said == f"b is not comparable with a: they differ in {setting}"
    assert "one of" not in three.verdicts()[1]  # one verdict is left
    allowed = compare(a, b, about=setting)
    assert allowed.verdict("b").startswith("b is better than a: accuracy +0.300 ±")
    assert not allowed._incomparable()


def test_ground_that_differs_within_a_run():
    a, b = results("a", [0.5, 0.6], data="x"), results("b", [0.5], data="x")
    b += results("b", [0.6], seeds=[1], data="y")
    assert compare(a, b).obstacles("b") == ["data"]


def test_several_verdicts_hold_together():
    rng = np.random.default_rng(0)
    wrong = []
    for _ in range(150):
        runs = [results(f"r{i}", rng.normal(0.5, 0.02, 5), i=i) for i in range(6)]
        said = compare(*runs).verdicts()
        wrong.append(any("can't be told apart" not in o for o in said))
    assert np.mean(wrong) < 0.09


def test_several_verdicts_are_each_a_sharper_test():
    a, *others = ([0.50, 0.52, 0.51], [0.55, 0.56, 0.58], [0.53, 0.54, 0.56], [0.50, 0.53, 0.51])
    named = [results(f"r{i}", o, i=i) for i, o in enumerate(others)]
    said = compare(results("a", a, i=9), *named).verdicts()
    for o, sentence in zip(others, said):
        p = stats.ttest_ind(o, a, equal_var=False).pvalue
        assert ("can't be told apart" in sentence) == (3 * p > 0.05)
        assert sentence.endswith("over 3 seeds, one of 3 verdicts")


def test_the_same_models_are_compared_within_pairs():
    plain = results("plain", [0.5, 0.6, 0.7], history=[dict(loss=1)], lr=1)
    five = results("five", [0.52, 0.62, 0.721], history=[dict(loss=1)], lr=1, views="five")
    looks = compare(plain, five)
    assert "five is better than plain" in looks.verdict("five")
    assert "over the same 3 models" in looks.verdict("five")
    assert not any("Welch" in o for o in looks.formatted())
    assert np.isnan(looks.table.welch["five"])
    # Another training of the same settings isn't the same models.
    again = results("five", [0.52, 0.62, 0.721], seconds=11.0, lr=1, views="five")
    assert "can't be told apart" in compare(plain, again).verdict("five")


def test_seeds_that_only_some_of_the_looks_have():
    plain = results("plain", [0.5, 0.6, 0.9], lr=1)
    five = results("five", [0.52, 0.62], lr=1, views="five")
    row = compare(plain, five).table.loc["five"]
    assert row.difference == row.paired_difference == pytest.approx(0.02)


def test_a_diverged_run_has_no_verdict():
    a, b = results("a", [0.5, 0.6]), results("b", [0.5, math.nan], lr=1)
    assert (
        compare(a, b).verdict("b") == "b can't be compared with a: accuracy is undefined in a run"
    )


def test_views_of_committed_results_are_recognized():
    for folder in ("tta-imagenette", "tta-flowers"):
        runs = load_results(folder)
        looks = compare(runs.pop("plain"), *runs.values())
        assert looks.table.welch.isna().all() and looks.table.paired[1:].notna().all()


# ---- McNemar -------------------------------------------------------------------------------------

CLASSES = st.integers(0, 2)
IMAGES = st.lists(st.tuples(CLASSES, CLASSES, CLASSES), min_size=1, max_size=40)


@given(IMAGES)
def test_mcnemar_counts_and_p(images):
    first, second, targets = torch.tensor(images).T
    m = mcnemar(first, second, targets)
    cells = {o: 0 for o in itertools.product([True, False], repeat=2)}
    for a, b, y in images:
        cells[a == y, b == y] += 1
    assert (m.both, m.only_first) == (cells[True, True], cells[True, False])
    assert (m.only_second, m.neither) == (cells[False, True], cells[False, False])
    right = [(o == targets).double().mean().item() for o in (first, second)]
    assert m.difference == pytest.approx(right[1] - right[0])
    thrown = m.only_first + m.only_second
    if not thrown:
        assert m.p == m.exact == 1
        return
    assert m.exact == pytest.approx(stats.binomtest(m.only_first, thrown).pvalue)
    # All ways in which so many coins fall: the less even, and half of those as uneven.
    least = min(m.only_first, m.only_second)
    ways = [math.comb(thrown, k) for k in range(thrown + 1)]
    uneven = 2 * sum(ways[:least]) + ways[least]
    assert m.p == pytest.approx(uneven / sum(ways))
    assert m.p <= m.exact + 1e-12


@given(IMAGES)
def test_mcnemar_from_the_other_side(images):
    first, second, targets = torch.tensor(images).T
    m, back = mcnemar(first, second, targets), mcnemar(second, first, targets)
    assert (m.p, m.exact) == (back.p, back.exact)
    assert (m.low, m.high) == pytest.approx((-back.high, -back.low))
    assert -1 <= m.low <= m.difference <= m.high <= 1 or m.n < 5


def test_mid_p_rejects_nearly_as_often_as_it_says():
    tables = {}
    n = 20
    for parted in range(n + 1):
        for b in range(parted + 1):
            first = torch.tensor([0] * b + [1] * (n - b))
            second = torch.tensor([1] * b + [0] * (parted - b) + [1] * (n - parted))
            tables[parted, b] = mcnemar(first, second, torch.zeros(n).long())

    def rejected(which, share):
        return sum(
            stats.binom.pmf(parted, n, share) * stats.binom.pmf(b, parted, 0.5)
            for (parted, b), m in tables.items()
            if getattr(m, which) <= 0.05
        )

    shares = (0.3, 0.5, 0.7, 1.0)
    exact, mid = ([rejected(o, share) for share in shares] for o in ("exact", "p"))
    assert max(exact) <= 0.05
    assert max(mid) <= 0.052
    assert sum(mid) > 1.1 * sum(exact)


def test_the_interval_of_a_change_holds_the_truth():
    rng = np.random.default_rng(0)
    shares = dict(both=0.6, first=0.05, second=0.1, neither=0.25)
    held = []
    for counts in rng.multinomial(100, list(shares.values()), 2000):
        first = np.repeat([0, 0, 1, 1], counts)
        second = np.repeat([0, 1, 0, 1], counts)
        m = mcnemar(first, second, np.zeros(100, dtype=int))
        held.append(m.low <= 0.05 <= m.high)
    assert 0.935 < np.mean(held) < 0.98


def test_mcnemar_takes_scores_and_indices():
    y = torch.tensor([0, 1, 1])
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    assert mcnemar(scores, y, y) == mcnemar(scores.argmax(1), y, y)
    assert mcnemar(scores.log().numpy(), y.tolist(), y) == mcnemar(scores, y, y)
    assert "1 gained, 0 lost" in str(mcnemar(scores, y, y))


@pytest.mark.parametrize(
    ("args", "kind", "words"),
    [
        (([0, 1], [0, 1, 1], [0, 1, 1]), ValueError, "first has the shape"),
        (([0, 1, 1], torch.rand(2, 2), [0, 1, 1]), ValueError, "second has the shape"),
        (([0.5, 1.0], [0, 1], [0, 1]), TypeError, "class numbers"),
        (([0, 1], [0, 1], [0.0, 1.0]), TypeError, "class numbers"),
        (([], [], torch.zeros(0).long()), ValueError, "one class index an image"),
        ((torch.full((2, 2), math.nan), [0, 1], [0, 1]), ValueError, "diverged"),
        (("ab", [0, 1], [0, 1]), TypeError, "first"),
    ],
)
def test_mcnemar_refuses(args, kind, words):
    with pytest.raises(kind, match=words):
        mcnemar(*args)
