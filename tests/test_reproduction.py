"""`harness reproduce SPEC`: from an empty folder to database, figures and a report, for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis import reproduction
from harness import cli
from harness.datasets import DatasetError, resolve
from harness.datasets.obtaining import makers, obtain
from harness.spec import dataset_names, load_experiment
from results.store import Store
from tests import inline

REPOSITORY = Path(__file__).resolve().parents[1]

SPEC = """
name: small
description: Two sizes of behaviour cloning on the bandit.
algorithms:
  bc: {config: {hidden_dim: 8, batch_size: 8, lr: 1.0e-5}}
  wide: {algorithm: bc, config: {hidden_dim: 16, batch_size: 8}}
datasets: [generated/bandit2d-v0]
seeds: 0-2
steps: 20
evaluation: {every: 10, episodes: 2}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SPEC)
    return path


def reproduce(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return cli.exit_code(result.exception), str(result.exception)
    return result.exit_code, result.stdout


def linked(report: Path) -> list[Path]:
    links = re.findall(r"\]\(([^)]+)\)", report.read_text())
    return [report.parent / link for link in dict.fromkeys(links)]


@pytest.mark.slow
def test_a_spec_becomes_a_database_figures_and_a_report_from_nothing(spec, tmp_path):
    """As the container runs it: no data, no database, a process of its own, Ray."""
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "reproduce", str(spec), "steps=10"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "HARNESS_HOME": str(home),
            "MINARI_DATASETS_PATH": str(tmp_path / "datasets"),
        },
        check=False,
    )
    assert done.returncode == cli.OK, done.stdout + done.stderr
    report = home / "reproduction" / "small" / reproduction.REPORT
    files = linked(report)
    assert all(path.is_file() for path in files)
    assert {path.suffix for path in files} == {".png", ".pdf", ".json", ".yaml"}
    with Store.open(f"sqlite:///{home / 'results.db'}") as store:
        assert store.counts()["runs"] == 6
        (digest,) = set(store.trials()["dataset_digest"])
        versions = store.runs()["versions"][0]
    text = report.read_text()
    assert digest in text
    assert versions["torch"] in text
    assert "| bc | generated/bandit2d-v0 | 0, 1, 2 | 10 | 2 | 3 done |" in text
    assert "## Leaderboard" in text
    assert "steps: 10" in text


def test_a_finished_sweep_is_only_reported_and_the_report_runs_itself_again(spec, bandit, tmp_path):
    home, out = Path(os.environ["HARNESS_HOME"]), tmp_path / "out"
    assert inline.sweep(spec, home).ok
    code, printed = reproduce(spec, "--out", out)
    assert code == cli.OK, printed
    assert "nothing to train" in printed
    first = (out / reproduction.REPORT).read_text()
    copied = load_experiment(out / reproduction.SPEC, [])
    assert copied.trials == load_experiment(spec, []).trials
    assert copied.run == load_experiment(spec, []).run
    (command,) = re.findall(r"```bash\nharness (.*)\n```", first)
    assert command == "reproduce spec.yaml --out ."
    code, printed = reproduce(out / reproduction.SPEC, "--out", out)
    assert code == cli.OK, printed
    assert (out / reproduction.REPORT).read_text() == first


def test_the_report_names_what_failed_and_what_never_ran(spec, bandit, tmp_path, monkeypatch):
    from algorithms.bc import BehaviourCloning

    loss = BehaviourCloning.update
    calls = 0

    def broken(learner, batch, rng):
        nonlocal calls
        calls += learner.config.hidden_dim == 16
        if calls > 5:
            raise RuntimeError("out of luck")
        return loss(learner, batch, rng)

    monkeypatch.setattr(BehaviourCloning, "update", broken)
    home = Path(os.environ["HARNESS_HOME"])
    assert not inline.sweep(spec, home).ok
    experiment = load_experiment(spec, ["seeds=0-3"])
    request = reproduction.Request("small", "", "name: small\n", "harness reproduce spec.yaml")
    with Store.open(inline.Home.find(home).database_url()) as store:
        from harness.ingest import Ingester

        Ingester(store, inline.Home.find(home)).register(experiment.trials)
        ids = [trial.id for trial in experiment.trials]
        text = reproduction.write(store, tmp_path / "out", ids, request).read_text()
    assert re.search(r"\| wide \| .* \| (3 failed, 1 never run) \|", text)
    assert "failed: RuntimeError: out of luck" in text
    assert "No printed number is about these trials." in text


def test_without_a_finished_run_the_report_says_what_happened_and_draws_nothing(spec, tmp_path):
    with Store.open(f"sqlite:///{tmp_path / 'empty.db'}") as store:
        request = reproduction.Request("small", "", "name: small\n", "harness reproduce spec.yaml")
        path = reproduction.write(store, tmp_path / "out", [], request)
    assert "## Leaderboard" not in path.read_text()
    assert not (tmp_path / "out" / "figures").exists()


def test_options_of_the_one_use_are_refused_with_the_other(spec, bandit):
    assert reproduce(spec, "--format", "json")[0] == cli.USAGE
    code, message = reproduce("bc", "--out", "somewhere")
    assert code == cli.USAGE
    assert "'bc' is not one" in message
    assert reproduce("bc", "seeds=0")[0] == cli.USAGE


def test_generated_datasets_are_made_and_others_asked_for(tmp_path, monkeypatch, spec):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("MINARI_REMOTE", f"file://{tmp_path / 'nowhere'}")
    told: list[str] = []
    assert dataset_names(spec) == ["generated/bandit2d-v0"]
    assert obtain([*dataset_names(spec), "generated/*"], told.append) == ["generated/bandit2d-v0"]
    assert obtain(dataset_names(spec), told.append) == []
    assert told == ["making generated/bandit2d-v0"]
    with pytest.raises(DatasetError):
        obtain(["mujoco/hopper/medium-v0"], told.append)


def test_everything_that_can_be_generated_is_known_by_the_id_it_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    found = makers()
    assert {"generated/pointmaze/large-dense-v0", "generated/navigation1d/medium-v0"} <= set(found)
    assert {resolve(name).relation for name in found} == {"generated"}
    for name in ("generated/ring2d-v0", "generated/navigation1d/expert-v0"):
        assert found[name]().id == name
