"""Which trials may be ranked together.

A track is a suite of datasets, each with one content and evaluated in one environment, in one
version of the simulator, by one protocol, of one tier. Leaderboards that rank, and figures that
aggregate, are made of one track each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from results.importing import SOURCE
from results.schema import canonical_json

if TYPE_CHECKING:
    import pandas as pd

ADROIT = ("door", "hammer", "pen", "relocate")
LOCOMOTION = ("ant", "halfcheetah", "hopper", "walker2d")


@dataclass(frozen=True, order=True)
class Track:
    """What may be ranked together.

    Attributes:
        suite: see `suite_of`.
        tier: whose numbers: "ours" (trained by this harness) or "imported".
        protocol: how policies were evaluated, in words.
        environment: version of the environments, and the simulator.
        generation: 0, unless the rest does not tell contents or environments of a dataset apart.
    """

    suite: str
    tier: str
    protocol: str
    environment: str
    generation: int = 0

    @property
    def title(self) -> str:
        later = f"; data generation {self.generation + 1}" if self.generation else ""
        return f"{self.suite}: {self.environment}; {self.protocol}{later}"

    @property
    def slug(self) -> str:
        """A name for files."""
        return slug(*map(str, vars(self).values()))


def split(trials: pd.DataFrame) -> list[tuple[Track, pd.DataFrame]]:
    """The trials of each track, in the order of the tracks.

    Where a group has one dataset with two contents or two environments, the later one is of the
    next generation, so that a track has one of each.
    """
    rows: list[Any] = list(trials.itertuples())
    heads = [
        (
            suite_of(row.dataset_id),
            tier_of(row),
            protocol_text(row.evaluation),
            _environment(row),
        )
        for row in rows
    ]
    kinds = [
        (row.dataset_digest, canonical_json(row.evaluation.get("environment"))) for row in rows
    ]
    found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for place in trials.created_at.to_numpy().argsort(kind="stable"):
        known = found.setdefault((*heads[place], rows[place].dataset_id), [])
        if kinds[place] not in known:
            known.append(kinds[place])
    places: dict[Track, list[int]] = {}
    for place, (head, kind) in enumerate(zip(heads, kinds, strict=True)):
        generation = found[*head, rows[place].dataset_id].index(kind)
        places.setdefault(Track(*head, generation), []).append(place)
    return [(track, trials.iloc[chosen]) for track, chosen in sorted(places.items())]


def suite_of(dataset_id: str) -> str:
    """The group of datasets whose scores are aggregated: "mujoco", "adroit", "pointmaze", ..."""
    parts = dataset_id.split("/")
    if len(parts) == 1:  # a name of D4RL: hopper-medium-v2, antmaze-umaze-v2
        first = re.split(r"[-_]", dataset_id)[0]
        return "mujoco" if first in LOCOMOTION else "adroit" if first in ADROIT else first
    if parts[0] == "D4RL":
        return "adroit" if parts[1] in ADROIT else parts[1]
    return parts[0]


def tier_of(trial: Any) -> str:
    """Whose number it is: ours (trained here) or imported."""
    return SOURCE if trial.evaluation.get("source") == SOURCE else "ours"


def protocol_text(evaluation: Mapping[str, Any]) -> str:
    """How policies were evaluated, in words."""
    if not evaluation:
        return "not recorded"
    if evaluation.get("source") == SOURCE:
        return "evaluated as its source did"
    known = (
        f"{evaluation.get('episodes', '?')} episodes every {evaluation.get('every', '?')} steps, "
        f"environment seeds from {evaluation.get('first_env_seed', 0)}"
    )
    listed = ("episodes", "every", "first_env_seed", "environment", "simulator")
    other = {name: value for name, value in evaluation.items() if name not in listed}
    return known + "".join(f", {name} {value}" for name, value in sorted(other.items()))


def slug(*parts: str) -> str:
    """A file name: what is readable of the first part, and a hash of all."""
    text = re.sub(r"[^A-Za-z0-9]+", "-", parts[0]).strip("-").lower()[:40]
    return f"{text}-{hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:8]}"


def _environment(trial: Any) -> str:
    """Version of the environment and the simulator: "v5, mujoco 3.11.0"."""
    name = (trial.evaluation.get("environment") or {}).get("env_id", "")
    version = re.search(r"-(v\d+)$", name)
    simulator = trial.simulator or "simulator not recorded"
    return f"{version[1]}, {simulator}" if version else simulator
