"""Reference scores and printed numbers that ship with the package."""

import math

import pytest

from results.published import PublishedTable, published_scores, read_scores, reference_scores


def test_reference_scores_are_d4rls():
    scores = reference_scores()
    assert len(scores) == 159
    assert scores["hopper-medium-v2"] == (-20.272305, 3234.3)
    assert scores["halfcheetah-expert-v2"] == (-280.178953, 12135.0)
    assert scores["antmaze-umaze-v2"] == (0.0, 1.0)
    assert scores["pen-human-v1"] == pytest.approx((96.262799, 3076.833102), abs=1e-6)
    assert scores["maze2d-large-v1"] == (6.7, 273.99)


def test_all_reference_scores_are_increasing_finite_pairs():
    for name, (low, high) in reference_scores().items():
        assert math.isfinite(low), name
        assert low < high < math.inf, name


def test_a_caller_cannot_change_the_scores_of_the_next():
    reference_scores().clear()
    assert reference_scores()


def number(table, name, dataset):
    found = [
        s
        for s in published_scores()
        if (s.table.table, s.name, s.dataset) == (table, name, dataset)
    ]
    assert len(found) == 1
    return found[0]


def test_printed_numbers_are_the_papers():
    """Checked by hand against the papers' tables."""
    ours = number("diffusion_ql_table1", "Diffusion-QL", "hopper-medium-v2")
    assert (ours.value, ours.spread, ours.spread_kind, ours.seeds) == (90.5, 4.6, "sem_rollouts", 5)
    assert (ours.algorithm, ours.selection, ours.origin) == (
        "diffusion_ql",
        "cloning-loss-3",
        "own",
    )
    assert (ours.rollouts, ours.steps) == (50, 2_000_000)
    corl = number("corl_readme_last", "TD3+BC", "halfcheetah-medium-v2")
    assert (corl.value, corl.spread, corl.seeds, corl.selection) == (48.10, 0.18, 4, "last")
    rebrac = number("rebrac_table2", "ReBRAC", "hopper-medium-v2")
    assert (rebrac.value, rebrac.spread, rebrac.seeds) == (102.0, 1.0, 10)
    quoted = number("diffusion_ql_table1", "IQL", "hopper-medium-v2")
    assert (quoted.origin, quoted.selection, quoted.spread) == ("quoted", "unknown", None)


def test_every_number_has_a_dataset_with_references_or_another_metric():
    known = reference_scores()
    for score in published_scores():
        if score.metric == "d4rl_normalized_score":
            assert score.dataset in known, score
            assert -20 < score.value < 250, score


def test_every_algorithm_and_preset_that_a_number_names_is_one_of_ours():
    from harness.registry import Registry, presets_of

    registry = Registry()
    for score in published_scores():
        if score.algorithm:
            recipe = registry.get(score.algorithm)
            assert score.preset in ("", *presets_of(recipe))


TABLE = PublishedTable("t", "Paper", "", "Table 1", "", "")
ROW = {
    "table": "t",
    "name": "A",
    "algorithm": "",
    "preset": "",
    "dataset": "d-v0",
    "metric": "d4rl_normalized_score",
    "value": "1.5",
    "spread": "0.5",
    "spread_kind": "std",
    "seeds": "4",
    "rollouts": "",
    "steps": "",
    "selection": "last",
    "origin": "own",
    "note": "",
}


def read(*rows):
    return read_scores(iter([(f"line {i}", row) for i, row in enumerate(rows, 2)]), {"t": TABLE})


def test_a_row_becomes_a_value():
    (score,) = read(ROW)
    assert (score.table, score.value, score.seeds, score.steps) == (TABLE, 1.5, 4, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "u"}, "line 2: 'u'"),
        ({"value": "nan"}, "value is nan"),
        ({"value": "high"}, "line 2: could not convert"),
        ({"seeds": "0"}, "seeds is 0"),
        ({"spread": ""}, "spread is None of kind 'std'"),
        ({"spread": "-1"}, "spread is -1"),
        ({"spread_kind": "sd"}, "spread_kind is 'sd'; expected one of std"),
        ({"selection": "first"}, "selection is 'first'"),
        ({"origin": ""}, "origin is ''"),
    ],
)
def test_a_row_that_is_not_valid_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read({**ROW, **change})


def test_a_number_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="line 3: t / A / d-v0 is there already"):
        read(ROW, ROW)
