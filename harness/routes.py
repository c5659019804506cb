"""A maze with four ways to one goal, for the question how many of them a policy still takes.

#########      The ball starts at r and goes to g. It passes each block above or below, so that
#.......#      there are four routes: two of 8 cells, two of 10 that change sides in between.
#r##.##g#
#.......#
#########
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

MAZE_MAP: list[list[int | str]] = [
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 0, 0, 1],
    [1, "r", 1, 1, 0, 1, 1, "g", 1],
    [1, 0, 0, 0, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
]
NUM_ROUTES = 4
HORIZON = 400  # steps; the slowest of 500 demonstrations takes 283
BLOCKS = (-1.5, 1.5)  # x of the blocks' middles; the maze's middle is at 0, and y > 0 is above


class RouteMode(gym.Wrapper):
    """Tells at the goal which route led there: `info["mode"]`, 0 to 3.

    1 for the first block passed above, plus 2 for the second; the last pass counts.
    """

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(**options)
        self._x = float(obs["achieved_goal"][0])
        self._above = [False for _ in BLOCKS]
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        x, y = (float(value) for value in obs["achieved_goal"])
        for index, middle in enumerate(BLOCKS):
            if (self._x < middle) != (x < middle):
                self._above[index] = y > 0.0
        self._x = x
        if terminated:
            info["mode"] = sum(2**index for index, above in enumerate(self._above) if above)
        return obs, reward, terminated, truncated, info
