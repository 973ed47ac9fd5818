from collections import Counter

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.steering.conditions import Condition, SteeringSettings, percent, plan
from sae_lens_gemma4.interp.steering.verdict import verdict
from tests.interp.steering.card import BASELINE, TABLE, N, condition, filled

CONDITIONS = plan(SteeringSettings(scales=[0.05, 0.1, 0.15], n_random=8))
SIGN = {"positive": 1, "negative": -1, "random": 0, "baseline": 0}


def simulated(rng, n, broken, recovered, planted=0.0, alike=0.0):
    """Outcomes of n items, half of them right at the baseline.

    Args:
        broken, recovered: of a scale's length, how likely a push breaks a right item and recovers a wrong one.
        planted: how much likelier the vector recovers and less likely it breaks, and the reverse when subtracted.
        alike: the share of items that every push changes or leaves alike.
    """
    before, common, shared = rng.random(n) < 0.5, rng.random(n), rng.random(n) < alike
    outcomes = {}
    for c in CONDITIONS:
        if c.kind == "baseline":
            outcomes[c] = before
            continue
        u = np.where(shared, common, rng.random(n))
        push = planted * SIGN[c.kind]
        outcomes[c] = np.where(before, u >= broken(abs(c.scale)) - push, u < recovered(abs(c.scale)) + push)
    return outcomes


def kinds(runs, *args, **kwargs):
    rng = np.random.default_rng(5)
    counts = Counter(verdict(simulated(rng, *args, **kwargs), permutations=300).kind for _ in range(runs))
    return {kind: counts[kind] / runs for kind in ("direction effect", "magnitude effect", "none")}


def test_the_cards_table_is_no_direction_effect_however_it_is_filled_in():
    """Adding and subtracting at 5.2 % differ by 5 items, whatever the sets: p is .0625 at the very least."""
    rng, opposite, found = np.random.default_rng(0), [], Counter()
    for seed in range(300):
        v = verdict(filled(rng), permutations=300, seed=seed)
        assert v.kind != "direction effect" and not v.controls
        assert "not established: no random control" in " ".join(v.notes)
        found[v.kind] += 1
        opposite.append(v.opposite)
        magnitude = {c.scale: c for c in v.magnitude}
        assert magnitude[0.157].p_value == pytest.approx(0.146, abs=5e-4)
    assert all(len(o) == 1 and o[0].difference == -0.1 and o[0].p_value >= 0.0625 for o in opposite)
    assert len({o[0].p_value for o in opposite}) > 3
    assert found["none"] == 300  # nor is its "monotone magnitude penalty" there


def test_the_cards_table_with_the_most_that_it_allows():
    """Sets nested so that the fewest items differ: 5 against 0."""
    least = min(binomtest(5 + more, 5 + 2 * more).pvalue for more in range(8))
    assert least == 0.0625
    outcomes = filled(np.random.default_rng(1))
    before, minus = outcomes[BASELINE], outcomes[condition(-0.052)].copy()
    plus = minus.copy()
    plus[np.flatnonzero(minus & ~before)[:2]] = False
    plus[np.flatnonzero(minus & before)[:3]] = False
    outcomes[condition(0.052)] = plus
    assert (int((plus & ~before).sum()), int((~plus & before).sum())) == TABLE[0.052]
    rng = np.random.default_rng(2)
    for draw in range(3):  # even with the random directions that it lacks
        outcomes[Condition(f"random {draw}", "random", 0.052, draw)] = rng.permutation(minus)
    v = verdict(outcomes, permutations=300)
    assert v.opposite[0].p_value == 0.0625 and v.kind != "direction effect"


def test_no_effect_is_called_one_in_at_most_five_of_a_hundred():
    for alike in (0.0, 0.9):
        rates = kinds(150, 60, lambda s: 0.2, lambda s: 0.2, alike=alike)
        assert rates["direction effect"] <= 0.05
        assert rates["direction effect"] + rates["magnitude effect"] <= 0.1 + 0.025


def test_a_magnitude_effect_is_not_called_a_direction():
    for alike, found in ((0.0, 0.95), (0.9, 0.65)):  # five directions that do the same are one
        rates = kinds(120, 100, lambda s: 3 * s, lambda s: s, alike=alike)
        assert rates["direction effect"] <= 0.05
        assert rates["magnitude effect"] >= found


def test_a_planted_direction_is_called_one():
    """15 points more recovered and fewer broken by adding, 15 the other way by subtracting, 100 items."""
    rates = kinds(120, 100, lambda s: 0.2, lambda s: 0.2, planted=0.15)
    assert rates["direction effect"] >= 0.9


def test_its_sign_and_its_words():
    rng = np.random.default_rng(3)
    for planted, sign, word in ((0.2, "helps", "more"), (-0.2, "hurts", "fewer")):
        v = verdict(simulated(rng, 150, lambda s: 0.25, lambda s: 0.25, planted=planted))
        assert (v.kind, v.sign) == ("direction effect", sign)
        assert f"points {word} right answers than subtracting it" in v.words
        assert v.to_dict()["verdict"] == v.kind and len(v.to_dict()["controls"]) == 6 and len(v.spread) == 3
        assert len(v.alone) == 6 and len(v.directions) == len(v.magnitude) == 4
        best = min(v.opposite, key=lambda o: o.p_value)
        for name, said in (("+", "adding makes "), ("−", "subtracting makes ")):
            [own] = [c for c in v.alone if c.name == f"{name} against baseline" and c.scale == best.scale]
            assert f"{said}{'+' if own.difference > 0 else '−'}{abs(100 * own.difference):.1f} points" in v.words


def test_without_random_directions_a_direction_effect_is_not_established():
    outcomes = simulated(np.random.default_rng(3), 150, lambda s: 0.25, lambda s: 0.25, planted=0.2)
    bare = {c: a for c, a in outcomes.items() if c.kind != "random"}
    v = verdict(bare)
    assert v.kind != "direction effect" and min(o.adjusted for o in v.opposite) < 0.001
    assert v.notes == (
        "A direction effect is not established: no random control.",
        "A magnitude effect is not established: it takes 3 directions of one length.",
    )
    best = min(v.opposite, key=lambda o: o.p_value)
    begin = (
        f"None: The two signs differ at {percent(best.scale)} (p = {best.adjusted:.2g}), but no random direction was"
    )
    assert v.words.startswith(begin)
    partly = {c: a for c, a in outcomes.items() if c.kind != "random" or c.scale == 0.1}
    assert verdict(partly).notes == ("A direction effect is not established at 5 %, 15 %: no random control.",)
    assert verdict(partly).kind == "direction effect"


def test_random_directions_that_do_the_same_undo_a_direction():
    """Adding keeps what the baseline has, subtracting breaks 15 items of 80."""
    n, before = 80, np.arange(80) < 40
    worse = before & (np.arange(n) >= 15)
    base = {BASELINE: before, condition(0.1): before, condition(-0.1): worse}
    kept, some_break = [before] * 8, [before] * 5 + [worse] * 3
    for randoms, direction, rank in ((kept, True, 0.0), (some_break, False, 3 / 8)):
        v = verdict(base | {Condition(f"r{i}", "random", 0.1, i): r for i, r in enumerate(randoms)})
        minus = next(c for c in v.controls if c.name == "− against random")
        assert v.opposite[0].p_value < 1e-3 and minus.adjusted < 0.01
        assert (minus.rank, v.kind == "direction effect") == (rank, direction)
    accuracies = [r.mean() for r in some_break]
    reference = 2 * stats.t.sf((15 / 80 / 2) / np.std(accuracies, ddof=1), 7)
    assert v.spread[0].p_value == pytest.approx(reference)


def test_a_single_random_direction_has_no_spread():
    outcomes = simulated(np.random.default_rng(3), 150, lambda s: 0.25, lambda s: 0.25, planted=0.2)
    v = verdict({c: a for c, a in outcomes.items() if c.kind != "random" or c.seed == 0})
    assert v.kind != "direction effect" and not v.spread
    assert v.notes[0].startswith("A direction effect is not established at 5 %, 10 %, 15 %: a single random direction")


def test_it_helps_or_hurts_only_by_what_the_vector_itself_does():
    n, before = 60, np.arange(60) < 30
    nothing, kills = before.copy(), np.zeros(n, dtype=bool)
    more, less, less_by_4 = np.arange(n) < 45, np.arange(n) < 15, np.arange(n) < 26
    for plus, minus, sign, said in (
        (nothing, kills, "subtracting hurts", "adding makes no difference (p = 1), subtracting makes −50.0 points"),
        (kills, nothing, "hurts", "adding makes −50.0 points (p = 3.7e-09), subtracting makes no difference (p = 1)"),
        (nothing, more, "subtracting helps", "adding makes no difference (p = 1), subtracting makes +25.0 points"),
        (less, kills, "hurts", "adding makes −25.0 points"),
        (np.arange(n) < 33, less_by_4, None, "adding makes +5.0 points (p = 0.25), subtracting makes −6.7 points"),
    ):
        outcomes = {BASELINE: before, condition(0.1): plus, condition(-0.1): minus}
        random = less_by_4 if sign is None else before
        v = verdict(outcomes | {Condition(f"r{i}", "random", 0.1, i): random for i in range(8)})
        assert (v.kind, v.sign) == ("direction effect", sign)
        assert said in v.words


def test_none_names_the_condition_that_failed():
    """Adding keeps what the baseline has, subtracting breaks 15 items of 80; random ones differ."""
    before, worse, better = np.arange(80) < 40, (np.arange(80) < 40) & (np.arange(80) >= 15), np.arange(80) < 55
    base = {BASELINE: before, condition(0.1): before, condition(-0.1): worse}

    def said(randoms):
        return verdict(base | {Condition(f"r{i}", "random", 0.1, i): r for i, r in enumerate(randoms)}).words

    less = before & (np.arange(80) >= 2)
    few, many = said([before, less]), said([better] * 4 + [worse] * 4)
    times = 7.5 / (2 / np.sqrt(2))
    p = 2 * stats.t.sf(times, 1)
    assert few.startswith("None: The two signs differ at 10 % (p = 6.1e-05), but 2 random directions are too few: ")
    assert f"half the difference is {times:.1f} times their spread (p = {p:.2g})" in few
    assert "but 8 random directions of that length differ as well: half the difference is 0.5 times" in many
    assert "The first test alone, adding against subtracting, of 80 items with 15 answers that differ would not" in few
    one = said([before])
    assert "but one random direction has no spread. " in one
    middle = before & (np.arange(80) >= 7)
    outcomes = {BASELINE: before, condition(0.1): before | (np.arange(80) < 43), condition(-0.1): middle}
    v = verdict(outcomes | {Condition(f"r{i}", "random", 0.1, i): before for i in range(8)}, alpha=0.01)
    assert (
        v.kind == "none"
        and "but neither is set apart from the mean of 8 random directions (least p = 0.031)" in v.words
    )


def drawn_directions(rng, n, scales, n_random, deviation):
    """Half right at the baseline; directions whose own effects on accuracy are drawn about a mean of nothing."""
    before = rng.random(n) < 0.5
    outcomes = {}
    effects = {None: rng.normal(0, deviation), **{i: rng.normal(0, deviation) for i in range(n_random)}}
    for c in plan(SteeringSettings(scales=scales, n_random=n_random)):
        push = effects[c.seed] * (-1 if c.kind == "negative" else 1)
        changed = rng.random(n) < np.clip(np.where(before, 0.2 - push, 0.2 + push), 0, 1)
        outcomes[c] = before if c.kind == "baseline" else np.where(changed, ~before, before)
    return outcomes


@pytest.mark.parametrize(
    ("deviation", "n_random", "scales"),
    [(0.114, 2, [0.1]), (0.076, 8, [0.1]), (0.114, 8, [0.1]), (0.114, 8, [0.05, 0.1, 0.15])],
)
def test_directions_that_each_do_something_are_no_magnitude_effect(deviation, n_random, scales):
    """By items alone they are one in up to a quarter of the runs."""
    rng, found, by_items, runs = np.random.default_rng(11), Counter(), 0, 150
    for _ in range(runs):
        v = verdict(drawn_directions(rng, 100, scales, n_random, deviation), permutations=50)
        found[v.kind] += 1
        by_items += any(c.adjusted <= 0.05 for c in v.magnitude)
    allowed = runs * 0.05 + 2 * np.sqrt(runs * 0.05 * 0.95)
    assert found["magnitude effect"] <= allowed and found["direction effect"] <= allowed
    if deviation == 0.114:
        assert by_items > runs * 0.15 > allowed


def test_a_magnitude_effect_takes_three_directions():
    """Every push breaks 20 of 40 right answers, each direction others by chance."""
    rng, before = np.random.default_rng(1), np.arange(80) < 40

    def pushed():
        broken = np.zeros(80, dtype=bool)
        broken[rng.choice(40, 20, replace=False)] = True
        return before & ~broken

    outcomes = {BASELINE: before, condition(0.1): pushed(), condition(-0.1): pushed()}
    for n_random, kind in ((0, "none"), (1, "none"), (2, "magnitude effect")):
        v = verdict(outcomes | {Condition(f"r{i}", "random", 0.1, i): pushed() for i in range(n_random)})
        assert v.kind == kind and v.magnitude[0].adjusted < 1e-4
        if kind == "none":
            assert "All pushes of 10 % together differ from the baseline" in v.words
            assert "but fewer than 3 directions were run so" in v.words and not v.directions
            assert v.notes[-1] == "A magnitude effect is not established: it takes 3 directions of one length."
    assert v.sign == "hurts" and "falls by 25.0 points, on average over directions, of which 3 were run" in v.words


def test_at_the_ceiling_or_floor_it_says_so():
    for right, note in (
        (48, "Ceiling: the baseline is right about 48 of 50 items; hardly an answer can be gained."),
        (1, "Floor: the baseline is right about 1 of 50 items; hardly an answer can be lost."),
        (47, None),
    ):
        before = np.arange(50) < right
        notes = verdict({BASELINE: before, condition(0.1): before, condition(-0.1): before}).notes
        assert (notes[0] == note) if note else not any("aseline is right" in n for n in notes)


def test_the_rule_is_in_the_result():
    rule = verdict(filled(np.random.default_rng(0)), alpha=0.01).to_dict()["rule"]
    assert (
        "two-sided at the level 0.01;" in rule and "(c) half the difference" in rule and "every single one" not in rule
    )


def test_none_says_what_could_have_been_seen():
    v = verdict(filled(np.random.default_rng(0)))
    assert v.kind == "none" and v.sign is None
    assert v.detectable.n == N and v.detectable.fewest == 6
    assert f"a change under {100 * v.detectable.change:.0f} points" in v.words


def test_a_run_of_one_sign_only():
    outcomes = filled(np.random.default_rng(0))
    v = verdict({c: a for c, a in outcomes.items() if c.scale >= 0})
    assert not v.opposite and v.kind == "none"
    assert "was not run both ways" in v.notes[0]


def test_numbers_that_make_no_sense():
    with pytest.raises(ConfigError, match="alpha lies between 0 and 1"):
        verdict(filled(np.random.default_rng(0)), alpha=1.0)
