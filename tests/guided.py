"""Small policy-guided agents, and what their first stage leaves behind."""

from __future__ import annotations

from algorithms import policy_guided
from algorithms.api import StageInput
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import TinyDataset
from harness.worker import MakeOutput

# Refreshed in steps 0 and 2: one that is not the first, and a resume between two.
SMALL = policy_guided.Config(
    window=4,
    stride=2,
    diffusion_batch_size=16,
    diffusion_ema_every=2,
    width=16,
    num_blocks=2,
    denoise_steps=3,
    refresh_every=2,
    num_windows=16,
    generations=2,
    dynamics_hidden_dim=16,
    batch_size=16,
    hidden_dim=16,
)


def measured_scale() -> dict[str, StageInput]:
    """The first stage's result on the dataset of the contract."""
    out = MakeOutput(1)
    config = policy_guided.ScaleConfig(draws=256)
    rng = Rng.at_step([0], 0, Stream.MAKE)
    policy_guided.measure_scale(config, TinyDataset(), {}, rng, out)
    return {"scale": StageInput(config, out.arrays)}
