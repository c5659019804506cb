"""Makes sure that a dataset is in the store: generated here if it can be, else downloaded.

Owns which ids can be generated, and with which default sizes; how is known to each generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from harness.datasets.catalog import POINTMAZE_ANCHORS, ROUTES_ID, resolve

Maker = Callable[[], Any]


def makers() -> dict[str, Maker]:
    """Dataset id -> what writes it with the generator's default size and seed 0."""
    from harness.datasets import bandit2d, navigation1d, pointmaze, routes

    found: dict[str, Maker] = {
        bandit2d.DATASET_ID: bandit2d.make_bandit2d,
        bandit2d.RING_ID: bandit2d.make_ring2d,
        ROUTES_ID: routes.make_routes,
    }
    for kind in navigation1d.NOISE:
        found[navigation1d.dataset_id_of(kind)] = partial(navigation1d.make_navigation1d, kind)
    for level in POINTMAZE_ANCHORS:
        maze, _, dense = level.partition("-")
        make = partial(pointmaze.make_pointmaze, maze, dense=bool(dense))
        found[pointmaze.dataset_id_of(level)] = make
    return found


def obtain(names: Iterable[str], tell: Callable[[str], None] = lambda text: None) -> list[str]:
    """Ids of the datasets that were not stored before and are now.

    Args:
        names: ids or D4RL names; a glob stands for what is stored already and fetches nothing.
        tell: told before each that takes time.
    Raises:
        DatasetError: if a name is unknown, or neither can be made nor downloaded.
    """
    from harness.datasets.fetching import download

    made = []
    for name in names:
        if any(char in name for char in "*?["):
            continue
        entry = resolve(name)
        if entry.is_stored:
            continue
        make = makers().get(entry.id)
        tell(f"{'making' if make else 'downloading'} {entry.id}")
        if make:
            make()
        else:
            download(entry.id)
        made.append(entry.id)
    return made
