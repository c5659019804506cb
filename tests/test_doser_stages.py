"""DOSER's stages through the worker: shared between cases, divergence as a result, acting again."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.actions import draw_actions
from harness.home import Home
from harness.spec import load_experiment
from results.store import Store
from tests import inline

SMALL = (
    "hidden_dim: 8, batch_size: 8, model_steps: 2, diffusion_batch_size: 8, "
    "dynamics_batch_size: 8, num_candidates: 2, sampler_steps: 1"
)
SPEC = f"""
name: tiny
algorithms:
  full: {{algorithm: doser, config: {{{SMALL}}}}}
  kind: {{algorithm: doser, preset: no_compensation, config: {{{SMALL}}}}}
  wild: {{algorithm: doser, config: {{{SMALL}, q_limit: -1.0e+6}}}}
datasets: [generated/bandit2d-v0]
seeds: 0-1
steps: 4
evaluation: {{every: 4, episodes: 2}}
run: {{log_every: 2, compile: "off", device: cpu}}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.mark.slow
def test_models_are_trained_once_and_a_limit_passed_is_a_result(spec, tmp_path):
    home = tmp_path / "home"
    inline.sweep(spec, home)
    found = Home.find(home)
    with Store.open(found.database_url()) as store:
        runs = store.runs().merge(store.trials()[["trial_id", "label"]], on="trial_id")
        made = store.artifacts().stage.value_counts().to_dict()
        drawn = draw_actions(load_experiment(spec, []), store, found, count=5, partial=True)
    status = runs.groupby("label").status.agg(set).to_dict()
    assert status == {"full": {"done"}, "kind": {"done"}, "wild": {"diverged"}}
    for error in runs[runs.label == "wild"].error:
        assert "q_policy is above -1e+06 at step 2" in error
    models = ("behaviour", "states", "dynamics", "thresholds", "candidates")
    assert made == {**dict.fromkeys(models, 2), "agent": 4}, "one of each for each seed"
    assert set(drawn.table.label) == {"full", "kind"}
