"""The command line: exit codes, messages and JSON, in processes of their own where it matters."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from harness import cli
from harness.cli import about, reproducing
from harness.display import Display
from tests import inline

REPOSITORY = Path(__file__).resolve().parents[1]

SPEC = """
name: tiny
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-2
steps: 20
evaluation: {every: 10, episodes: 4}
run: {log_every: 5, compile: "off", device: cpu}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    """A command in a process of its own, as a user's shell runs it."""
    return subprocess.run(
        [sys.executable, "-m", "harness.cli", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def invoke(*arguments: object) -> tuple[int, str, str]:
    """A command in this process: exit code, standard output, standard error."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return cli.exit_code(result.exception), result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_a_mistake_is_one_line_with_the_nearest_name_and_exit_code_2(spec):
    done = run("sweep", spec, "stepz=5")
    assert done.returncode == cli.USAGE
    assert "Did you mean 'steps'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["x-[a-z]*", "q[/x]*", "d:x:*"])
def test_an_error_shows_names_as_they_were_given(spec, name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", str(spec), f'datasets=["{name}"]'])
    assert ended.value.code == cli.USAGE
    assert name in capsys.readouterr().err


def test_the_display_shows_what_an_error_says_whatever_brackets_it_has():
    out = io.StringIO()
    display = Display(Console(file=out, width=200), 2)
    error = "RuntimeError: [/pytorch/third_party/gloo/pair.cc:534] [enforce fail at a.cpp:117] no"
    display.end("a", Text.assemble(("bc[wide] seeds 0: failed", "red"), f" {error}"))
    display.line(f"bc: crashed {error}; again")
    assert out.getvalue().splitlines() == [
        f"[1/2] bc[wide] seeds 0: failed {error}",
        f"bc: crashed {error}; again",
    ]


def test_a_bug_is_said_to_be_one(monkeypatch, capsys):
    for error, is_bug in ((NameError("name 'x' is not defined"), True), (ValueError("no"), False)):

        def broken(*_, error=error, **__):
            raise error

        monkeypatch.setattr(cli, "app", broken)
        with pytest.raises(SystemExit):
            cli.main([])
        said = capsys.readouterr().err
        assert f"error {error}" in said
        assert ("this is a bug; HARNESS_DEBUG=1 shows where" in said) == is_bug


def test_unknown_options_and_missing_specs_are_usage_errors(spec, tmp_path):
    assert run("sweep", spec, "--dry").returncode == cli.USAGE
    done = run("sweep", tmp_path / "absent.yaml")
    assert done.returncode == cli.USAGE
    assert "absent.yaml" in done.stderr


def test_a_database_that_cannot_be_opened_is_an_environment_error(spec, tmp_path):
    not_a_database = tmp_path / "text.db"
    not_a_database.write_text("this is not a database, and it is long enough to look like one" * 20)
    done = run("sweep", spec, "--dry-run", "--db", f"sqlite:///{not_a_database}")
    assert done.returncode == cli.ENVIRONMENT
    assert "text.db" in done.stderr


def test_a_dry_run_prints_the_plan_and_leaves_no_trial(spec):
    code, out, _ = invoke("sweep", spec, "--dry-run", "--json")
    assert code == cli.OK
    plan = json.loads(out)
    assert plan["counts"]["trials"] == 3
    assert [stack["seeds"] for stack in plan["stacks"]] == [[0, 1, 2]]
    code, out, _ = invoke("status", "--json")
    assert json.loads(out)["cells"] == []


def test_status_and_leaderboard_read_what_a_sweep_left(spec, tmp_path):
    inline.sweep(spec, Path(os.environ["HARNESS_HOME"]))
    code, out, _ = invoke("status", spec, "--json")
    assert code == cli.OK
    (cell,) = json.loads(out)["cells"]
    assert (cell["label"], cell["done"], cell["steps"]) == ("bc", 3, 20)
    code, first, _ = invoke("leaderboard", spec, "--format", "json")
    assert code == cli.OK
    assert json.loads(first)
    assert invoke("leaderboard", spec, "--format", "json")[1] == first
    code, out, _ = invoke("figures", spec, "--out", tmp_path / "figures")
    assert code == cli.OK
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} >= {".pdf", ".png"}


def test_status_and_plan_show_labels_with_brackets(spec):
    labels = "bc[wide]: {algorithm: bc}, bc[narrow]: {algorithm: bc, config: {hidden_dim: 4}}"
    wanted = (f"algorithms={{{labels}}}".replace("bc[", '"bc[').replace("]:", ']":'), "seeds=0")
    code, out, _ = invoke("sweep", spec, *wanted, "--dry-run")
    assert code == cli.OK
    assert "bc[wide]" in out
    assert "bc[narrow]" in out
    inline.sweep(spec, Path(os.environ["HARNESS_HOME"]), wanted)
    code, out, _ = invoke("status")
    assert code == cli.OK
    assert "bc[wide]" in out
    assert "bc[narrow]" in out


def test_a_file_that_is_no_archive_is_a_usage_error(spec, tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_text("text")
    for arguments in (
        ["merge", tmp_path / "absent.parquet"],
        ["merge", bad],
        ["leaderboard", "--db", tmp_path / "absent.parquet"],
        ["archive", spec, "--out", tmp_path / "rows.parquet"],
    ):
        assert invoke(*arguments)[0] == cli.USAGE, arguments


@pytest.mark.parametrize("command", ["leaderboard", "table"])
def test_with_nothing_to_show_a_table_is_an_error_and_not_empty(command, spec):
    code, out, error = invoke(command, spec)
    assert (code, out) == (cli.USAGE, "")
    assert "no run to show; run a sweep first" in error


def test_a_sweep_that_needs_nothing_only_tidies_and_does_not_start_ray(spec):
    home = Path(os.environ["HARNESS_HOME"])
    inline.sweep(spec, home)
    left, young = (home / "artifacts" / f".tmp-x-{2**22 + 1}-{name}" for name in "ab")
    left.mkdir()
    young.mkdir()
    os.utime(left, (0, 0))  # of a publication that was killed long ago
    done = run("sweep", spec, "--json")
    assert done.returncode == cli.OK, done.stderr
    assert (left.exists(), young.exists()) == (False, True)
    assert json.loads(done.stdout)["counts"] == {"done": 3}


def test_the_estimate_counts_stacks_that_run_at_once(spec):
    inline.sweep(spec, Path(os.environ["HARNESS_HOME"]), ["seeds=0"])

    def seconds(most):
        wanted = ("seeds=0-4", "run.max_stack=1", "run.cpus_per_stack=0.01")
        code, out, _ = invoke(
            "sweep", spec, *wanted, f"run.max_concurrent={most}", "--dry-run", "--json"
        )
        assert code == cli.OK
        return json.loads(out)["seconds"]

    assert seconds(2) == pytest.approx(seconds(1) / 2)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("command", ["sweep", "work", "reproduce", "quickstart"])
def test_a_signal_while_a_command_starts_is_an_interruption(spec, monkeypatch, command, number):
    """A batch job that is told to end so early has to ask to be requeued, too."""

    def unhandled(*arguments):
        raise RuntimeError("the signal would have ended the process")

    notice = lambda *arguments: os.kill(os.getpid(), number)  # noqa: E731
    monkeypatch.setattr("harness.spec.load_experiment", notice)
    monkeypatch.setattr("harness.cli.reproducing._make_quickstart_data", lambda: None)
    before = signal.signal(number, unhandled)
    try:
        code, _, err = invoke(command, *([spec] if command != "quickstart" else []))
        assert signal.getsignal(number) is unhandled
    finally:
        signal.signal(number, before)
    assert (code, "the same command continues" in err) == (cli.INTERRUPTED, True)


def test_a_share_without_trials_says_so(spec):
    code, out, error = invoke("work", spec, "--shard=3/4")
    assert code == cli.OK, error
    assert "shard 3/4 has nothing to do: there are more shards than trials" in out


def test_a_share_that_was_interrupted_says_how_to_go_on(spec, monkeypatch):
    from harness import work

    monkeypatch.setattr(work, "work", lambda *_, **__: work.Done(1, {}, interrupted=True))
    code, out, _ = invoke("work", spec)
    assert code == cli.INTERRUPTED
    assert "3 trials, 1 stack run; interrupted; the same command continues" in " ".join(out.split())
    assert "puts the rows" not in out


def test_algorithms_are_listed_with_their_config():
    code, out, _ = invoke("algorithms", "--json")
    assert code == cli.OK
    assert {"bc", "diffusion_ql"} <= {item["name"] for item in json.loads(out)}
    code, out, _ = invoke("algorithms", "diffusion_ql", "--json")
    assert json.loads(out)["config"]["denoise_steps"] == 5
    code, _, error = invoke("algorithms", "difusion_ql")
    assert code == cli.USAGE
    assert "diffusion_ql" in error


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        ("float | None", "float | None"),
        (tuple[int, ...], "tuple[int, ...]"),
        (float | None, "float | None"),
    ],
)
def test_a_fields_type_reads_as_it_was_written(annotation, text):
    """Third parties may evaluate their annotations."""
    assert about.type_name(annotation) == text


def test_the_quickstart_finds_its_experiment_and_ends_as_its_sweep(bandit, monkeypatch):
    asked = []

    def interrupted(experiment, *_):
        asked.append(experiment)
        raise typer.Exit(cli.INTERRUPTED)

    monkeypatch.setattr(reproducing, "_make_quickstart_data", lambda: None)
    monkeypatch.setattr(reproducing, "sweep_experiment", interrupted)
    code, _, error = invoke("quickstart", f"datasets=[{bandit}]")
    assert code == cli.INTERRUPTED, error
    (experiment,) = asked
    assert experiment.name == "quickstart"
    assert {trial.dataset_id for trial in experiment.trials} == {bandit}


@pytest.mark.slow
def test_the_doctor_finds_this_environment_fit():
    done = run("doctor", "--json")
    checks = {item["name"]: item for item in json.loads(done.stdout)}
    assert done.returncode == cli.OK, done.stdout
    assert checks["Ray"]["state"] == "ok"
    assert checks["MuJoCo"]["state"] == "ok"


@pytest.mark.slow
def test_a_sweep_through_ray_ends_in_the_database(spec, tmp_path):
    """The same trials through Ray Tune and in this process give the same rows."""
    done = run("sweep", spec, "--home", tmp_path / "ray", "run.max_stack=1")
    assert done.returncode == cli.OK, done.stdout + done.stderr
    inline.sweep(spec, tmp_path / "inline")
    assert inline.rows(tmp_path / "ray") == inline.rows(tmp_path / "inline")


@pytest.mark.slow
def test_a_sweep_runs_the_installed_code_wherever_it_is_started(spec, tmp_path):
    """A project's own `harness` folder in the working folder is nobody's business."""
    decoy = tmp_path / "project" / "harness"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise ImportError('the decoy was imported')\n")
    start = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from harness.cli import main; "
    start += "sys.path.pop(0); main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "sweep", str(spec), "seeds=0", "--json"],
        cwd=decoy.parent,
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == cli.OK, done.stdout + done.stderr
    assert json.loads(done.stdout)["counts"] == {"done": 1}
