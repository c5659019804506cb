"""What a Ray worker runs in a test where it must not read data itself."""

from __future__ import annotations

from typing import Any


def train_without_reading(config: dict[str, Any]) -> None:
    from harness import tune, worker

    def refused(*_: Any) -> None:
        raise AssertionError("this worker read data that its node has")

    worker.load_dataset = refused
    tune._train_stack(config)
    (data,) = worker._held.values()
    for name in ("obs", "action", "next_obs"):
        assert not getattr(data, name).numpy().flags.writeable, "mapped, not copied"
