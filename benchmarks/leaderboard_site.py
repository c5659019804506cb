"""Speed and size of the leaderboard's pages, on made-up results.

    python benchmarks/leaderboard_site.py    10,080 runs: 36 methods x 14 tasks x 10 seeds x 2
    python benchmarks/leaderboard_site.py --methods 4    a tenth of it

Prints seconds, and megabytes of what a browser reads for the first page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import synthetic

from analysis.site import pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", type=int, default=36)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=10)
    options = parser.parse_args()
    start = time.perf_counter()
    store = synthetic.store(
        options.methods, 10, options.evaluations, options.episodes, simulators=2, tasks=14
    )
    with store, tempfile.TemporaryDirectory() as folder:
        counts = store.counts()
        print(f"{counts['runs']:,} runs, {counts['evals']:,} evaluation rows "
              f"(made in {time.perf_counter() - start:.1f} s)")  # fmt: skip
        start, cpu = time.perf_counter(), time.process_time()
        first = pages.write(store, Path(folder))
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
        print(f"pages built in {seconds:.1f} s, {busy:.1f} s of them on a core")
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        opened = [first, *(first.parent / "static").glob("site.*")]
        print(f"first page {sum(file.stat().st_size for file in opened) / 1e6:.2f} MB, "
              f"all {len(files):,} files {total / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
