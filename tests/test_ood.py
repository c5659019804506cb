"""Detectors: one interface, what they find, and the command that compares them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from algorithms.api import Train
from algorithms.blocks.rng import Rng, Stream
from algorithms.detectors import DetectorConfig, detectors
from algorithms.testing import CHECKS, Case, TinyDataset
from analysis.detection import auroc, measure, with_interval
from harness import datasets
from harness.cli import app
from harness.datasets.data_spec import DataSpec
from harness.datasets.navigation1d import make_navigation1d
from harness.ood import PolicyActions, Rows, compare, policy_actions, records, split
from results.store import Store

SMALL = DetectorConfig(batch_size=32, hidden_dim=16, steps=3, passes=3, memory=40)
NAMES = tuple(detectors())


@pytest.fixture
def navigation(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    make_navigation1d("medium", steps=2000)
    return datasets.load("generated/navigation1d/medium-v0")


def moved(dataset: TinyDataset) -> TinyDataset:
    """Actions near a function of the observation."""
    dataset.action = 0.7 * torch.tanh(dataset.obs[:, :2])
    return dataset


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_one_for_each_action_and_a_seeds_own(name):
    kind, config = detectors(SMALL)[name]
    dataset = moved(TinyDataset())

    def scored(seeds):
        learner = kind(config, dataset.spec, seeds, {})
        rng = Rng.at_step(seeds, 0, Stream.TEST)
        with torch.no_grad():
            learner.finish(dataset, rng)
            batch = dataset.transitions(rng, 32)
            return learner.score(batch.obs, batch.action, rng)

    both, alone = scored((5, 6)), scored((6,))
    assert both.shape == (2, 32)
    assert torch.isfinite(both).all()
    assert not torch.equal(both[0], both[1])
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("diffusion_10", "stratified", "neighbours")]
)
def test_detectors_that_train_keep_the_contract(name):
    kind, config = detectors(SMALL)[name]
    case = Case(Train(name, kind, config, config.steps))
    for check in CHECKS:
        check(case)


def test_neighbours_are_counted_by_brute_force():
    kind, config = detectors(replace(SMALL, neighbour=3))["neighbours"]
    dataset = moved(TinyDataset())
    learner = kind(replace(config, memory=60), dataset.spec, (0,), {})
    rng = Rng.at_step((0,), 0, Stream.TEST)
    learner.finish(dataset, rng)
    action = torch.full((1, 2, 2), 0.3)
    found = learner.score(dataset.obs[None, :2], action, rng)[0]
    mean, std = (torch.tensor(v) for v in (dataset.spec.statistics.obs_mean,
                                           dataset.spec.statistics.obs_std))  # fmt: skip
    pairs = torch.cat(((dataset.obs - mean) / (std + 1e-3), dataset.action), dim=1)
    for row in (0, 1):
        query = torch.cat(((dataset.obs[row] - mean) / (std + 1e-3), action[0, row]))
        expected = sorted((pairs - query).norm(dim=1).tolist())[2]
        assert found[row].item() == pytest.approx(expected, abs=1e-3)


def test_an_ensemble_of_equal_networks_does_not_disagree():
    kind, config = detectors(SMALL)["ensemble"]
    dataset = TinyDataset()
    learner = kind(config, dataset.spec, (0,), {})
    rng = Rng.at_step((0,), 0, Stream.TEST)
    batch = dataset.transitions(rng, 8)
    assert (learner.score(batch.obs, batch.action, rng) > 0).all()
    for parameter in learner.model.parameters():
        parameter.copy_(parameter[:, :1].expand_as(parameter))
    assert learner.score(batch.obs, batch.action, rng).max() < 1e-5


def test_episodes_are_held_out_whole():
    lengths = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    training, held_out = split(lengths)
    episode = np.repeat(np.arange(10), lengths)
    assert sorted([*training, *held_out]) == list(range(lengths.sum()))
    assert not set(episode[training]) & set(episode[held_out])
    assert len(set(episode[held_out])) == 1
    with pytest.raises(ValueError, match="at least 2"):
        split(np.array([7]))


def test_a_part_of_a_dataset_draws_its_own_rows_only(navigation):
    part = Rows(navigation, np.array([5, 6, 900]))
    batch = part.transitions(Rng.at_step((0, 1), 0, Stream.TEST), 50)
    assert part.spec.num_steps == 3
    assert set(batch.index.flatten().tolist()) == {5, 6, 900}


def test_navigation_follows_its_rules_and_its_anchors(navigation):
    obs, action = navigation.obs[:, 0], navigation.action[:, 0]
    expected = (obs + action).clamp(-10, 10)
    assert (navigation.next_obs[:, 0] - expected).abs().max() < 1e-5
    torch.testing.assert_close(navigation.reward, -navigation.next_obs[:, 0].abs())
    far = (obs.abs() > 2) & (action.abs() < 1)
    assert (action[far].sign() == -obs[far].sign()).all()
    starts = np.linspace(-10, 10, 20_001)
    going = [-np.maximum(np.abs(starts) - t, 0.0) for t in range(1, 21)]
    from harness.environments import Navigation1D

    anchors = (-20 * np.abs(starts).mean(), np.sum(going, axis=0).mean())
    assert pytest.approx(anchors, abs=0.01) == Navigation1D.ANCHORS
    with pytest.raises(ValueError, match="expert, medium"):
        make_navigation1d("random")


def test_denoising_error_separates_uniform_actions_after_a_little_training(navigation):
    config = replace(SMALL, batch_size=128, hidden_dim=32, steps=250, lr=3e-3)
    (found,) = compare(navigation, [0, 1], ["diffusion_10"], config, 400, device="cpu",
                       compile_mode="off")  # fmt: skip
    assert found.data.shape == found.against["uniform"].shape == (2, 400)
    for k in (0, 1):
        assert auroc(found.data[k], found.against["uniform"][k]) > 0.75
    (first,) = measure("x", found.data[:1], {"uniform": found.against["uniform"][:1]})
    assert first.auroc == pytest.approx([auroc(found.data[0], found.against["uniform"][0])])


def test_a_seed_does_not_depend_on_the_seeds_beside_it(navigation):
    names = ["diffusion_10", "stratified", "neighbours"]
    kwargs = {"count": 30, "device": "cpu", "compile_mode": "off"}
    both = compare(navigation, [3, 4], names, SMALL, **kwargs)
    alone = compare(navigation, [4], names, SMALL, **kwargs)
    for one, other in zip(both, alone, strict=True):
        assert one.data[1:] == pytest.approx(other.data, rel=1e-3)
        assert one.against["uniform"][1:] == pytest.approx(other.against["uniform"], rel=1e-3)


def test_unknown_detectors_are_refused_with_the_known_ones(navigation):
    with pytest.raises(ValueError, match="diffusion_1"):
        compare(navigation, [0], ["difusion"], SMALL)


@pytest.mark.parametrize("name", ["uniform", "perturbed"])
def test_a_policy_with_the_name_of_a_built_in_comparison_is_refused(navigation, name):
    policies = {name: PolicyActions(np.zeros((3, 1)), np.zeros((3, 1)))}
    with pytest.raises(ValueError, match=f"called '{name}'.* another label"):
        compare(navigation, [0], ["neighbours"], SMALL, count=10, actions=policies)


def test_actions_of_policies_are_taken_from_their_table():
    table = pd.DataFrame(
        {
            "dataset_id": ["d", "d"],
            "label": ["a", "b"],
            **{f"obs_{i}": [i, 10 + i] for i in range(11)},
            "action_0": [0.5, 0.25],
        }
    )
    wider = {"dataset_id": "other", "label": "a", "action_0": 0.0, "action_1": 1.0}
    wider |= {f"obs_{i}": 0.0 for i in range(13)}
    table = pd.concat([table, pd.DataFrame([wider])], ignore_index=True)
    found = policy_actions(table, "d")
    assert list(found) == ["a", "b"]
    assert found["b"].obs.tolist() == [[10.0 + i for i in range(11)]], "in the order of the numbers"
    assert found["b"].action.tolist() == [[0.25]]
    assert found["a"].digest != found["b"].digest
    with pytest.raises(ValueError, match="only on d, other"):
        policy_actions(table, "e")


def test_policies_are_drawn_at_held_out_observations_as_often_as_the_data(navigation):
    """The data's own actions given as a policy's are told from held-out ones by chance only."""
    every = PolicyActions(navigation.obs.numpy(), navigation.action.numpy())
    training, held_out = split(navigation.lengths)
    (found,) = compare(navigation, [0, 1, 2], ["neighbours"], SMALL, 400, {"same": every},
                       device="cpu")  # fmt: skip
    assert found.against["same"].shape == found.data.shape == (3, 400)
    (kept,) = compare(
        navigation, [0, 1, 2], ["neighbours"], SMALL, 400,
        {"same": PolicyActions(every.obs[held_out], every.action[held_out])}, device="cpu",
    )  # fmt: skip
    assert (found.against["same"] == kept.against["same"]).all(), "others were never drawn"
    for k in range(3):
        assert auroc(found.data[k], found.against["same"][k]) == pytest.approx(0.5, abs=0.06)
    seen = PolicyActions(every.obs[training][:5], every.action[training][:5])
    with pytest.raises(ValueError, match=r"none of the 5 actions of 'p'.*--count"):
        compare(navigation, [0], ["neighbours"], SMALL, 10, {"p": seen}, device="cpu")


def test_rows_of_another_policy_or_of_other_transitions_do_not_hide_each_other(navigation):
    first = PolicyActions(navigation.obs.numpy(), navigation.action.numpy())
    second = PolicyActions(first.obs, -first.action)

    def rows(policy, data=None):
        found = compare(navigation, [0], ["neighbours"], SMALL, 50, {"p": policy}, device="cpu")
        measured = [m for s in found for m in measure(s.detector, s.data, s.against)]
        return records(navigation.spec, [0], found, measured, {"p": policy}, data)

    with Store.open("sqlite://") as store:
        assert store.append(rows(first)) == 1 + 3
        assert store.append(rows(first)) == 0
        assert store.append(rows(second)) == 1, "built-in comparisons are the same"
        assert store.append(rows(first, DataSpec(truncated_last_step="keep"))) == 3
        stored = store.detections()
        p = stored[stored.against == "p"]
        assert len(p) == 3
        assert p.auroc.nunique() == 2


def test_intervals_need_seeds():
    assert with_interval(np.array([0.5, 0.7])) == "0.600"
    many = with_interval(np.array([0.5, 0.6, 0.7, 0.6, 0.6]))
    assert many.startswith("0.600 [0.5")


@pytest.mark.slow
def test_the_command_stores_what_it_prints_and_draws(navigation, tmp_path):
    arguments = ["ood", "generated/navigation1d/medium-v0", "--seeds", "0-2", "--steps", "3",
                 "--count", "20", "--detector", "cvae", "--detector", "neighbours", "--json",
                 "--out", str(tmp_path / "ood"), "--home", str(tmp_path / "home")]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    from harness.home import Home
    from results.store import Store

    with Store.open(Home.find(str(tmp_path / "home")).database_url(None)) as store:
        stored = store.detections()
    assert len(stored) == 2 * 2 * 3
    for entry in printed["detections"]:
        rows = stored[(stored.detector == entry["detector"]) & (stored.against == entry["against"])]
        assert rows.auroc.tolist() == entry["auroc"]
        assert rows.fpr95.tolist() == entry["fpr95"]
    assert [path.endswith(("png", "pdf", "json")) for path in printed["files"]] == [True] * 6
