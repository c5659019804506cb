"""Verdicts: what may be compared, what an interval says, and what is assumed about the printed."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from analysis import verdicts
from analysis.verdicts import judge, paper_error, reproduce, seeds_to_settle, stem
from harness.cli import app
from harness.cli.reproducing import published_settings
from results.published import published_scores
from results.records import DatasetRecord, EvalRecord, RunRecord, TrialRecord
from results.store import Store

TIME = "2031-05-06T07:08:09Z"
ORIGINAL = "d4rl-original/hopper-medium-v2"
LOW, HIGH = -20.272305, 3234.3


def printed(table="td3bc_table9", dataset="hopper-medium-v2", **changes):
    (found,) = [
        s
        for s in published_scores()
        if (s.table.table, s.dataset, s.origin) == (table, dataset, "own")
    ]
    return dataclasses.replace(found, **changes)


# ---------------------------------------------------------------------------------- the interval


def test_the_interval_is_welchs():
    """A printed std of n seeds (ddof 0) is what n seeds with that std would give."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(60, 3, size=5), rng.normal(58, 2, size=8)
    number = printed(
        value=float(theirs.mean()), spread=float(theirs.std()), spread_kind="std", seeds=8
    )
    _, difference, _, _ = judge(ours, number)
    expected = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_a_reproduced_number_that_is_clearly_lower_is_said_to_be():
    number = printed(value=61.5, spread=0.5, spread_kind="std", seeds=5)
    assert judge(TIGHT, number)[2] == "the whole interval is within 3 points, though ours is lower"


TIGHT = [59.0, 60.0, 61.0, 60.0, 60.5]


@pytest.mark.parametrize(
    ("scores", "value", "verdict"),
    [
        (TIGHT, 60.0, "reproduced"),
        (TIGHT, 61.5, "reproduced"),  # different from zero, yet within the margin
        (TIGHT, 80.0, "lower"),
        (TIGHT, 40.0, "higher"),
        (TIGHT, 63.0, "lower"),  # reaches beyond the margin, and is below zero
        ([40.0, 60.0, 80.0], 60.0, "inconclusive"),
        ([40.0, 60.0, 80.0], 70.0, "inconclusive"),
        ([60.0, 60.0], 60.0, "inconclusive"),
        ([60.0] * 3, 60.0, "reproduced"),
    ],
)
def test_verdicts(scores, value, verdict):
    number = printed(value=value, spread=0.5, spread_kind="std", seeds=5)
    assert judge(scores, number)[0] == verdict


def test_an_inconclusive_verdict_says_how_many_seeds_would_settle_it():
    number = printed(value=60.0, spread=1.0, spread_kind="std", seeds=10)
    verdict, _, reason, _ = judge([54.0, 60.0, 66.0], number, 5.0)
    needed = seeds_to_settle(0.0, 6.0, 3, 1 / 3, 9, 5.0)
    assert verdict == "inconclusive"
    assert f"about {needed} seeds" in reason
    assert 6 < needed < 12
    # With that many seeds of the same mean and spread it is settled; with one less it is not.
    for count, settled in ((needed, True), (needed - 1, False)):
        scores = scipy.stats.zscore(np.arange(count), ddof=1) * 6 + 60
        assert (judge(scores, number, 5.0)[0] == "reproduced") == settled


def test_no_number_of_seeds_settles_what_the_printed_number_leaves_open():
    number = printed(value=60.0, spread=20.0, spread_kind="unknown", seeds=None)
    assert "no number of seeds" in judge([59.0, 60.0, 61.0], number)[2]


@pytest.mark.parametrize(
    ("changes", "error", "freedom", "remark"),
    [
        ({"spread": 6.0, "spread_kind": "std", "seeds": 5}, 3.0, 4, "sqrt"),
        ({"spread": 6.0, "spread_kind": "std", "seeds": None}, 6.0, None, "not divided"),
        (
            {"spread": 2.0, "spread_kind": "sem_rollouts", "seeds": 5, "rollouts": 45},
            6.0,
            4,
            "widened as if all",
        ),
        ({"spread": 2.0, "spread_kind": "unknown", "seeds": 5}, 2.0, 4, "unknown kind"),
        ({"spread": None, "spread_kind": "none", "seeds": 4}, 5.0, 3, "no spread printed"),
        ({"spread": None, "spread_kind": "none", "seeds": None}, 10.0, None, "as one seed"),
    ],
)
def test_a_printed_spread_is_read_at_its_largest(changes, error, freedom, remark):
    found = paper_error(printed(**changes), our_std=10.0)
    assert found[:2] == (pytest.approx(error), freedom)
    assert remark in found[2]


def test_a_standard_error_over_rollouts_is_never_taken_for_one_over_seeds():
    """The seeds' part of it is unknown: the largest is sqrt(rollouts / seeds) times as wide."""
    number = printed("diffusion_ql_table1")
    assert paper_error(number, 1.0)[0] == pytest.approx(4.6 * 10**0.5)


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(ValueError, match="margin"):
        judge(TIGHT, printed(), margin)


# ------------------------------------------------------------------------- what may be compared


def test_stems():
    names = ("hopper-medium-v2", ORIGINAL, "surrogate/hopper/medium-v0", "mujoco/hopper/medium-v0")
    assert {stem(name) for name in names} == {"hopper-medium"}
    assert stem("D4RL/pointmaze/umaze-dense-v2") == stem("maze2d-umaze-dense-v1")
    assert stem("D4RL/antmaze/large-play-v1") == "antmaze-large-play"


def records(
    scores=TIGHT,
    dataset_id=ORIGINAL,
    relation="original",
    env_id="Hopper-v4",
    algorithm="td3_bc",
    evaluations=10,
    status="done",
    **config,
):
    """A method's runs with normalised scores in points, the same at every evaluation."""
    settings = dict(published_settings("td3_bc", "", ("hopper-medium-v2",)))
    data = {k.removeprefix("data."): settings.pop(k) for k in list(settings) if "data." in k}
    found = [DatasetRecord(dataset_id, "d", env_id, relation, LOW, HIGH, "D4RL", 10, 1)]
    for seed, score in enumerate(scores):
        name = f"{algorithm}/{dataset_id}/{seed}"
        evaluation = {"environment": {"env_id": env_id}, "episodes": 1, "every": 100_000}
        found.append(
            TrialRecord(
                trial_id=name,
                variant_id=f"{algorithm}/{dataset_id}",
                label=algorithm,
                algorithm=algorithm,
                revision=1,
                dataset_id=dataset_id,
                dataset_digest="d",
                data=data,
                config={**settings, **config},
                seed=seed,
                evaluation=evaluation,
                simulator="mujoco 3.11.0",
                created_at=TIME,
            )
        )
        run = (name + "#", name, 1, status, TIME, TIME, "", False, {}, {}, "cpu", False, (seed,))
        found.append(RunRecord(*run))
        episode_return = LOW + score / 100 * (HIGH - LOW)
        found += [
            EvalRecord(f"{name}#", 100_000 * step, 0, 0, episode_return, 5)
            for step in range(1, evaluations + 1)
        ]
    return found


def report(rows, **options):
    with Store.open("sqlite://") as store:
        store.append(rows)
        return reproduce(store, settings=published_settings, **options)


def only(rows, **options):
    (found,) = report(rows, **{"algorithm": "td3_bc", **options}).judgements
    return found


def test_the_original_data_under_the_papers_protocol_are_judged():
    found = only(records())
    assert (found.published.table.table, found.selection) == ("td3bc_table9", "last-10")
    assert found.verdict == "inconclusive"  # their 4.2 over 5 seeds is 2.1 of the mean
    assert only(records(), margin=8.0).verdict == "reproduced"
    assert found.difference.value == pytest.approx(np.mean(TIGHT) - 59.3)
    assert any("Hopper-v4 on mujoco 3.11.0" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"dataset_id": "surrogate/hopper/medium-v0", "relation": "local"},
            "other data: surrogate/hopper/medium-v0 (local) is not hopper-medium-v2",
        ),
        (
            {"dataset_id": "mujoco/hopper/medium-v0", "relation": "different"},
            "other data: mujoco/hopper/medium-v0 (different)",
        ),
        (
            {"dataset_id": "generated/hopper/medium-v0", "relation": "generated"},
            "(generated) is not hopper-medium-v2",
        ),
        ({"relation": "regenerated"}, "other environment version"),
        ({"dataset_id": "d4rl-original/hopper-medium-v1"}, "hopper-medium-v1 is not"),
        ({"env_id": "Hopper-v5"}, "other environment version: evaluated in Hopper-v5"),
        ({"steps": 20_000}, "other protocol: 20,000 gradient steps, theirs 1,000,000"),
        ({"q_coef": 1.0}, "other settings than published: q_coef 1.0 instead of 2.5"),
        ({"evaluations": 2}, "selected by last-10, but seeds 0-4 has only 2 evaluations"),
    ],
)
def test_what_is_not_comparable_has_a_reason_and_no_difference(changes, reason):
    found = only(records(**changes))
    assert found.verdict == "not comparable"
    assert reason in found.reason
    assert found.difference is None
    assert found.seeds == 5


def test_nothing_but_originals_is_ever_compared_with_a_printed_number():
    for relation in ("regenerated", "different", "generated", "local", "surrogate", "unheard of"):
        assert only(records(relation=relation)).verdict == "not comparable"


def test_a_seed_that_is_missing_leaves_no_verdict():
    rows = records() + records(scores=[50.0] * 6, status="failed")[-12:]
    found = only(rows)
    assert found.verdict == "inconclusive"
    assert "seed 5 failed" in found.reason
    assert found.difference is None


def test_the_nearest_source_is_taken_unless_all_are_asked_for():
    assert len(report(records(), algorithm="td3_bc").judgements) == 1
    everything = report(records(), algorithm="td3_bc", all_tables=True).judgements
    assert {j.published.origin for j in everything} == {"own", "rerun", "quoted"}
    quoted = next(j for j in everything if j.published.origin == "quoted")
    assert any("as quoted by" in remark for remark in quoted.remarks)


def test_a_glob_chooses_datasets_and_unmeasured_ones_are_noted():
    assert report(records(), dataset="walker2d-*").judgements == ()
    assert len(report(records(), dataset="hopper-*").judgements) == 1
    note = report(records(), algorithm="td3_bc", dataset="hopper-medium-*").notes[0]
    assert "hopper-medium-expert-v2" in note
    assert "hopper-medium-v2" not in note


def test_an_algorithm_without_printed_numbers_is_refused():
    with pytest.raises(ValueError, match="about 'td4_bc'; there are some of bc"):
        report(records(), algorithm="td4_bc")


def test_without_published_settings_it_says_that_they_were_not_checked():
    with Store.open("sqlite://") as store:
        store.append(records())
        (found,) = reproduce(store, "td3_bc").judgements
    assert any("settings were not checked" in remark for remark in found.remarks)


# ------------------------------------------------------------------------------------- the forms


def test_forms():
    found = report(
        records() + records(algorithm="bc", dataset_id="x/hopper/medium-v0", relation="local")
    )
    text = verdicts.markdown(found)
    assert "| td3\\_bc |" in text
    assert "not comparable" in text
    assert "within 3 points" in text
    content = json.loads(verdicts.json(found))
    assert content["margin"] == 3.0
    assert {j["verdict"] for j in content["judgements"]} <= set(verdicts.Verdict.__args__)


def test_the_command_reads_the_shipped_archives_and_compares_no_surrogate(tmp_path):
    """Expert's reading: data, environment and steps differ from every paper's, and each is said."""
    arguments = ["reproduce", "diffusion_ql", "--format", "json", "--home", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    found = json.loads(result.stdout)["judgements"]
    shipped = [
        f"surrogate/{robot}/{name}-v0 (local) is not {robot}-{name}-v2"
        for robot, name in (
            ("hopper", "medium"),
            ("hopper", "medium-replay"),
            ("halfcheetah", "medium"),
        )
    ]
    for judgement in found:
        assert judgement["verdict"] == "not comparable"
        assert judgement["difference"] is None
        assert any(text in judgement["reason"] for text in shipped)
        assert "gradient steps" in judgement["reason"]
        assert judgement["seeds"] == 4
    assert all(any(text in judgement["reason"] for judgement in found) for text in shipped)


@pytest.mark.parametrize("form", ["rich", "markdown"])
def test_the_command_prints_tables(form, tmp_path):
    arguments = ["reproduce", "--format", form, "--home", str(tmp_path), "--dataset", "hopper-*"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "Printed numbers and ours" in result.stdout


def test_printed_steps_are_those_of_our_tables():
    """Otherwise a faithful run would be called another protocol."""
    checked = 0
    for score in published_scores():
        known = score.algorithm and published_settings(
            score.algorithm, score.preset, (score.dataset,)
        )
        if known and score.steps is not None:
            assert known["steps"] == score.steps, score
            checked += 1
    assert checked > 300


def test_data_kept_from_the_learner_is_a_setting_that_was_not_published():
    known = {"lr": 3e-4, "data.reward": "none", "steps": 100}
    trial = {"algorithm": "a", "dataset_id": "d-v0", "config": {"lr": 3e-4, "steps": 5}}
    published = SimpleNamespace(dataset="d", preset="")
    differing = lambda data: verdicts.settings_differing(  # noqa: E731
        {**trial, "data": data}, published, lambda *asked: known
    )
    assert differing({"reward": "none"}) == []
    found = differing({"reward": "none", "held_out": 0.1})
    assert found == ["data.held_out 0.1 instead of None"]
