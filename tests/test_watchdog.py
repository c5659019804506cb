"""A process that hangs is ended and says where; one that goes on is left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from harness import watchdog
from harness.watchdog import Watchdog

REPOSITORY = Path(__file__).resolve().parents[1]
HANGS = """
import sys, time
from pathlib import Path
from harness.watchdog import Watchdog

def wait_for_ever():
    {how}

with Watchdog(Path(sys.argv[1]), 0.5):
    wait_for_ever()
"""


def hang(path: Path, how: str) -> subprocess.CompletedProcess:
    script = path.with_suffix(".py")
    script.write_text(HANGS.format(how=how))
    command = [sys.executable, str(script), str(path)]
    return subprocess.run(command, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, timeout=60)


def test_a_process_that_waits_for_ever_is_ended_and_tells_where(tmp_path):
    path = tmp_path / "stale"
    assert hang(path, "time.sleep(1000)").returncode == 1
    report = watchdog.report(path, 0.5)
    assert "wait_for_ever" in report
    assert report.splitlines()[-1].startswith("no progress for 0.5 s (run.stale_after_s), last at")
    assert "stale.py" in report.splitlines()[-1]


def test_holding_pythons_lock_does_not_help(tmp_path):
    """One call into C that takes minutes and never lets another thread of Python run."""
    path = tmp_path / "stale"
    assert hang(path, "sum(range(10**12))").returncode == 1
    assert "wait_for_ever" in watchdog.report(path, 0.5)


def test_a_process_that_is_fed_lives_and_leaves_no_file(tmp_path):
    path = tmp_path / "stale"
    with Watchdog(path, 0.4) as dog:
        for _ in range(12):
            time.sleep(0.1)
            dog.feed()
        assert path.exists()
    assert not path.exists()
    time.sleep(0.5)  # it is no longer armed
    assert watchdog.report(path, 0.4) is None


def test_zero_seconds_is_off(tmp_path):
    with Watchdog(tmp_path / "stale", 0.0):
        assert not (tmp_path / "stale").exists()
