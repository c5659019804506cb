"""Claims of an experiment: verdicts against textbook intervals and power, and the whole path."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synthetic
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from analysis import claims
from harness import cli
from harness.spec import Claim, SpecError, claims_of, load_experiment
from results import archive
from tests import inline

SPEC = """
name: sizes
algorithms:
  small: {algorithm: bc, config: {hidden_dim: 4, batch_size: 8}}
  large: {algorithm: bc, config: {hidden_dim: 16, batch_size: 8, lr: 1.0e-2}}
datasets: [generated/bandit2d-v0]
seeds: 0-3
steps: 10
evaluation: {every: 10, episodes: 2}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu}
claims:
  - {better: large, than: small, text: Larger is better.}
  - {better: small, than: large, margin: -1000}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "sizes.yaml"
    path.write_text(SPEC)
    return path


def test_the_interval_of_one_task_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    better, than = rng.normal(3, 2, 6), rng.normal(0, 2, 6)
    judged = claims.judge([(better - than).tolist()])
    expected = scipy_stats.ttest_rel(better, than).confidence_interval(0.95)
    assert (judged.difference.low, judged.difference.high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.0], 0.0, "holds"),
        ([1.0, 1.1, 0.9, 1.0], 2.0, "fails"),
        ([-1.0, -1.1, -0.9, -1.0], 0.0, "fails"),
        ([-1.0, -1.1, -0.9, -1.0], -2.0, "holds"),
        ([1.0, -1.1, 0.9, -1.0], 0.0, "open"),
        ([0.0, 0.0, 0.0], 0.0, "open"),
        ([0.0, 0.0, 0.0], -1.0, "holds"),
        ([9.0, 9.1], 0.0, "open"),
    ],
)
def test_a_verdict_follows_the_interval_and_the_margin(differences, margin, verdict):
    assert claims.judge([differences], margin).verdict == verdict


def test_without_a_common_seed_there_is_no_difference():
    judged = claims.judge([[]])
    assert (judged.difference, judged.verdict) == (None, "open")


def test_seeds_to_settle_have_the_power_that_simulation_finds():
    """The smallest number with 80 % power by its own formula has it by brute force too."""
    effect, std, seeds = 1.0, 1.6, 4
    needed = claims.seeds_for_power(effect, std / seeds**0.5, seeds - 1, seeds)
    rng = np.random.default_rng(0)

    def share(count: int) -> float:
        draws = rng.normal(effect, std, (40_000, count))
        error = draws.std(axis=1, ddof=1) / count**0.5
        quantile = scipy_stats.t.ppf(0.975, count - 1)
        return float((draws.mean(axis=1) - quantile * error > 0).mean())

    assert share(needed) >= 0.8 - 0.01
    assert share(needed - 1) < 0.8 + 0.01


def test_no_number_of_seeds_settles_what_is_no_difference():
    assert claims.seeds_for_power(1e-6, 1.0, 3, 4) is None


def test_tasks_weigh_the_same_and_pairs_are_of_one_seed():
    store = synthetic.store(methods=2, seeds=4, simulators=1, tasks=2)
    claim = Claim("method_01", "method_00", "One is above nought.")
    report = claims.build(store, [claim])
    assert [finding.task for finding in report.findings][-1] == claims.EVERYWHERE
    one, other, both = report.findings
    # Seed 0 of method_00 diverged on one of the tasks: its pair is left out, and named.
    (incomplete,) = (finding for finding in (one, other) if finding.seeds == (3,))
    assert "seed 0 diverged" in incomplete.judgement.remark
    assert "see above" in both.judgement.remark
    mean = (one.judgement.difference.value + other.judgement.difference.value) / 2
    assert both.judgement.difference.value == pytest.approx(mean)
    assert both.better - both.than == pytest.approx(mean)
    assert sorted(both.seeds) == [3, 4]


@pytest.mark.parametrize("better", ["method_00", "method_01"])
def test_seeds_that_are_left_when_one_diverged_are_no_verdict(better):
    store = synthetic.store(methods=2, seeds=4, simulators=1, tasks=2)
    than = {"method_00": "method_01", "method_01": "method_00"}[better]
    findings = claims.build(store, [Claim(better, than, "Surely.", margin=-1000.0)]).findings
    complete, incomplete, both = sorted(findings, key=lambda found: -min(found.seeds))
    assert complete.judgement.verdict == "holds"
    for finding in (incomplete, both):
        assert finding.judgement.verdict == "open"
        assert finding.judgement.difference.low > -1000
        assert "holds for the other seeds, which are a selection" in finding.judgement.remark


def test_a_glob_chooses_the_tasks_and_an_unknown_method_has_no_score():
    store = synthetic.store(methods=1, seeds=3, simulators=1, tasks=3)
    claim = Claim("method_00", "nobody", "A claim.", datasets="*expert*")
    (finding,) = claims.build(store, [claim]).findings
    assert "expert" in finding.task
    assert finding.judgement.difference is None
    assert "nobody: never run" in finding.judgement.remark


def test_the_command_judges_draws_and_reads_archives(spec, bandit, tmp_path, monkeypatch):
    home = tmp_path / "home"
    assert inline.sweep(spec, home).ok
    arguments = ["claims", str(spec), "--home", str(home), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Larger is better." in " ".join(shown.stdout.split())
    written = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert [finding["verdict"] for finding in written["findings"]][-1] == "holds"
    page = (tmp_path / "out" / "claims.md").read_text()
    assert "small above large by more than -1000" in page
    with inline.Store.open(inline.Home.find(home).database_url()) as store:
        archive.write(
            store, tmp_path / "rows.parquet", [t.id for t in load_experiment(spec).trials]
        )
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "nothing"))
    arguments[3:] = ["--db", str(tmp_path / "rows.parquet"), "--json"]
    arguments += ["--out", str(tmp_path / "again"), "--home", str(tmp_path / "empty")]
    again = CliRunner().invoke(cli.app, [arguments[0], arguments[1], *arguments[3:]])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["claims"] == written["findings"]


def test_the_figure_has_a_line_for_each_finding():
    store = synthetic.store(methods=3, seeds=4, simulators=1, tasks=2)
    stated = [Claim("method_02", "method_01", "A."), Claim("method_00", "method_01", "B.", -5.0)]
    report = claims.build(store, stated)
    made = claims.figure(report)
    (axis,) = made.axes
    assert len(axis.get_yticks()) == len(report.findings) == 6


def test_an_experiment_without_claims_says_so():
    store = synthetic.store(methods=1, seeds=3, simulators=1, tasks=1)
    with pytest.raises(ValueError, match="claims nothing"):
        claims.build(store, [])


# ------------------------------------------------------------------------------ experiment files


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{better: large}", r"claims\[0\]\.than is missing"),
        ("{better: lagre, than: small}", r"no algorithm 'lagre'.*'large'"),
        ("{better: large, than: large}", "not above itself"),
        ("{better: large, than: small, by: 3}", "unknown key 'by'"),
        ("{better: large, than: small, datasets: 'nothing*'}", "matches none of"),
        ("3", "expected a mapping"),
    ],
)
def test_claims_about_nothing_are_refused(claim, message, spec, bandit):
    spec.write_text(SPEC.split("claims:")[0] + f"claims: [{claim}]\n")
    with pytest.raises(SpecError, match=message):
        load_experiment(spec)


def test_claims_about_what_was_not_selected_are_left_out(spec, bandit):
    assert len(load_experiment(spec).claims) == 2
    assert load_experiment(spec, ["algorithms=[large]"]).claims == ()
    assert "claims" not in load_experiment(spec, ["algorithms=[large]"]).source
    assert len(claims_of(spec)) == 2


def test_claims_do_not_change_trials(spec, bandit):
    with_claims = load_experiment(spec).trials
    spec.write_text(SPEC.split("claims:")[0])
    assert load_experiment(spec).trials == with_claims


def test_duck_typed_claims_are_enough():
    made_up = SimpleNamespace(better="method_00", than="method_01", text="", margin=0, datasets="*")
    store = synthetic.store(methods=2, seeds=3, simulators=1, tasks=1)
    assert len(claims.build(store, [made_up]).findings) == 1
