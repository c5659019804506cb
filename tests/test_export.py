"""Exported policies: the same actions from the files alone, or nothing is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from small_catalog import PLUGIN
from torch import nn
from typer.testing import CliRunner

from algorithms.blocks.rng import RowRng, Stream
from harness import cli, policies
from harness import export as exports
from harness.export import ExportError, export, load
from harness.home import Home
from harness.registry import Registry
from results.store import Store
from tests import inline

SPEC = """
name: tiny
algorithms:
  drawn: {algorithm: bc, config: {hidden_dim: 8, batch_size: 8, sample_actions: true}}
  point: {algorithm: bc, config: {hidden_dim: 8, batch_size: 8, head: deterministic, sample_actions: false}}
  diffusion: {algorithm: diffusion_ql, config: {hidden_dim: 8, batch_size: 8, denoise_steps: 2, num_candidates: 5, candidate_choice: softmax}}
datasets: [generated/bandit2d-v0]
seeds: [3]
steps: 10
evaluation: {every: 10, episodes: 4}
run: {log_every: 5, compile: "off", device: cpu}
"""  # noqa: E501
ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="the extra `export` is not installed")


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def trained(spec: Path, label: str) -> tuple[policies.Trained, policies.Loader]:
    """A swept policy and what loads it."""
    home = Home.find(os.environ["HARNESS_HOME"])
    overrides = [f"algorithms=[{label}]"]
    inline.sweep(spec, home.root, overrides)
    with Store.open(home.database_url()) as store:
        ((found,), _) = policies.named([str(spec), *overrides], store, home, Registry())
    return found, policies.Loader(Registry(), torch.device("cpu"))


def rows_of(trainer, obs) -> RowRng:
    row = torch.arange(obs.shape[1]).unsqueeze(0)
    return RowRng(trainer.seeds, trainer.step, Stream.TEST, row, row + 1)


@pytest.mark.parametrize("label", ["drawn", "diffusion"])
def test_weights_alone_act_as_the_policy_did_and_the_rest_is_not_there(spec, tmp_path, label):
    found, loader = trained(spec, label)
    done = export(found, loader, tmp_path / "out", "safetensors", rows=20)
    assert done.difference == 0.0
    folder = tmp_path / "out" / found.run_id
    assert [path.name for path in done.files] == ["policy.safetensors", "policy.safetensors.json"]
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in done.files]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [found.run_id]

    again = load(folder)
    trainer, dataset = loader.load(found)
    obs = torch.randn(1, 30, 2)
    expected = trainer.learner.act(obs, rows_of(trainer, obs))
    assert torch.equal(again.act(obs, rows_of(trainer, obs)), expected)
    from safetensors.torch import load_file

    kept = set(load_file(folder / "policy.safetensors"))
    parts = {name.partition(".")[0] for name in kept}
    assert parts == ({"actor", "target_critic"} if label == "diffusion" else {"actor"})
    for name, tensor in again.state_dict().items():
        if tensor.is_floating_point():
            assert bool(tensor.isnan().any()) == (name not in kept), name

    about = json.loads(done.files[1].read_text())
    assert about["trial"] == found.trial.identity()
    assert about["run_id"] == found.run_id
    assert about["steps_done"] == 10
    assert about["compared"]["max_abs_difference"] == 0.0
    assert about["dataset"] == json.loads(json.dumps(dataclasses.asdict(dataset.spec)))


def test_files_that_were_changed_or_are_of_another_revision_are_refused(spec, tmp_path):
    found, loader = trained(spec, "point")
    done = export(found, loader, tmp_path, "safetensors", rows=13)
    path, about = done.files
    written = about.read_text()
    about.write_text(written.replace('"revision": 1', '"revision": 99'))
    with pytest.raises(ExportError, match="revision 99, but revision 1 is installed"):
        load(path.parent)
    about.write_text(written)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportError, match="not the file that its JSON file describes"):
        load(path.parent)
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_a_policy_built_from_other_stages_is_exported_with_them(tmp_path, bandit, monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    path = tmp_path / "two.yaml"
    path.write_text(
        "name: two\nalgorithms: [two_stage]\ndatasets: [generated/bandit2d-v0]\nseeds: [3]\n"
        'evaluation: {every: 40, episodes: 2}\nrun: {compile: "off", device: cpu}\n'
    )
    found, loader = trained(path, "two_stage")
    done = export(found, loader, tmp_path / "out", "safetensors", rows=13)
    assert [file.name for file in done.files] == [
        "need-calibration.safetensors",
        "need-teacher.safetensors",
        "policy.safetensors",
        "policy.safetensors.json",
    ]
    assert done.difference == 0.0
    sys.modules.pop("two_stage_plugin", None)


# ------------------------------------------------------------------------ programs and ONNX


@pytest.mark.parametrize(
    ("label", "names"),
    [("point", ["obs"]), ("drawn", ["obs", "normal_0"])],
)
def test_a_program_takes_observations_and_noise_of_any_number_of_rows(spec, tmp_path, label, names):
    found, loader = trained(spec, label)
    done = export(found, loader, tmp_path, "torch.export", rows=13)
    about = json.loads(done.files[1].read_text())
    assert [each["name"] for each in about["inputs"]] == names
    assert done.difference <= 1e-6
    program = torch.export.load(done.files[0])
    assert not any("optim" in name for name in program.state_dict)
    trainer, _ = loader.load(found)
    for count in (1, 2, 11):
        obs = torch.randn(count, 2)
        noise = (torch.randn(count, 2),) if label == "drawn" else ()
        action = program.module()(obs, *noise)
        expected = exports.Actor(trainer.learner, trainer.step)(obs, *noise)
        torch.testing.assert_close(action, expected, atol=1e-6, rtol=0)
        if noise:
            assert not torch.equal(action, program.module()(obs, -noise[0]))


@pytest.mark.slow
def test_a_diffusion_policy_is_a_program_of_its_noise(spec, tmp_path):
    found, loader = trained(spec, "diffusion")
    done = export(found, loader, tmp_path, "torch.export", rows=13)
    about = json.loads(done.files[1].read_text())
    assert [(each["name"], each["shape"]) for each in about["inputs"]] == [
        ("obs", ["N", 2]),
        ("normal_0", ["N", 5, 2, 2]),
        ("uniform_1", ["N", 5]),
    ]
    assert about["output"] == {"name": "action", "shape": ["N", 2]}
    parts = {name.split(".")[1] for name in torch.export.load(done.files[0]).state_dict}
    assert parts >= {"actor", "target_critic"}
    assert not parts & {"critic", "ema_actor", "actor_optim", "critic_optim"}


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("label", ["point", "drawn", "diffusion"])
def test_an_onnx_graph_acts_as_the_policy(spec, tmp_path, label):
    import onnxruntime

    found, loader = trained(spec, label)
    done = export(found, loader, tmp_path, "onnx", rows=13)
    assert done.difference <= 1e-5
    session = onnxruntime.InferenceSession(str(done.files[0]), providers=["CPUExecutionProvider"])
    about = json.loads(done.files[1].read_text())
    assert [each.name for each in session.get_inputs()] == [
        each["name"] for each in about["inputs"]
    ]


def test_a_missing_package_is_named_before_anything_is_loaded(spec, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"needs onnx.*offline-rl-harness\[export\]"):
        export(None, None, tmp_path, "onnx")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ comparing


def test_files_that_act_differently_are_not_kept(spec, tmp_path, monkeypatch):
    found, loader = trained(spec, "point")
    monkeypatch.setattr(
        exports, "_run_program", lambda path, inputs, names: torch.full((len(inputs[0]), 2), 0.3)
    )
    with pytest.raises(ExportError, match=r"acts differently as torch.export: \d+ of 13 actions"):
        export(found, loader, tmp_path / "out", "torch.export", rows=13)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_policy_that_cannot_be_traced_is_refused_with_a_format_that_fits(
    spec, tmp_path, monkeypatch
):
    from algorithms.bc import BehaviourCloning

    found, loader = trained(spec, "point")
    monkeypatch.setattr(
        BehaviourCloning, "act", lambda self, obs, rng: obs * float(self.low.sum() + obs.sum())
    )
    with pytest.raises(ExportError, match=r"cannot be written as torch\.export(.|\n)*safetensors"):
        export(found, loader, tmp_path / "out", "torch.export", rows=5)
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_formats_and_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of safetensors, torch\.export, onnx"):
        export(None, None, tmp_path, "pickle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows is 1;"):
        export(None, None, tmp_path, "safetensors", rows=1)  # type: ignore[arg-type]


def test_given_numbers_are_taken_in_the_order_of_the_calls():
    class Policy(nn.Module):
        def act(self, obs, rng):
            first = rng.uniform(obs.shape[1], 1)
            return obs + first + 10 * rng.integers(7, obs.shape[1], 1) + 0 * rng.step.float()

    policy, seeds = Policy(), torch.tensor([0])
    example = exports._act(policy, seeds, seeds, torch.zeros(3, 1))
    assert example.names == ["obs", "uniform_0", "integers_1"]
    assert [draw.describe("x")["values"] for draw in example.draws] == [
        "uniform in [0, 1)",
        "integers in [0, 7)",
    ]
    assert torch.equal(exports.Actor(policy, seeds)(*example.inputs), example.actions)


def test_the_command_says_what_it_compared(spec, tmp_path):
    found, _ = trained(spec, "point")
    arguments = ["export", found.run_id, "--out", str(tmp_path / "out"), "--rows", "14"]
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == cli.OK, done.output
    ((shown,), left_out) = json.loads(done.stdout).values()
    assert (shown["run_id"], shown["max_abs_difference"], shown["observations"], left_out) == (
        *(found.run_id, 0.0, 14),
        {},
    )
    assert all(Path(path).exists() for path in shown["files"])
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == cli.OK, done.output
    assert "policy.safetensors" in done.stdout
