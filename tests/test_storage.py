"""Homes that share nothing but a storage: what one node leaves, another finds whole, or not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from small_catalog import PLUGIN

from harness import cluster, preflight, storage, sweep
from harness.artifacts import ArtifactError
from harness.home import Home
from harness.ingest import Ingester
from harness.spec import load_experiment
from harness.spool import Spool, parse
from harness.storage import Hold, StackBusyError, Storage, StorageError
from harness.work import Shard, work
from results.records import MetricRecord
from results.store import Store
from tests import inline
from tests.processes import harness, ray_workers, wait_for

SPEC = """
name: shared
algorithms: [two_stage]
datasets: [generated/bandit2d-v0]
seeds: 0-1
steps: 40
evaluation: {every: 10, episodes: 2}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu, max_stack: 2}
"""
STAGE, OTHER = "a" * 64, "b" * 64


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def spec(tmp_path, bandit, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(PLUGIN))
    path = tmp_path / "shared.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path / 'storage'}"


def node(tmp_path: Path, name: str, url: str) -> Home:
    return Home.find(tmp_path / name).shared(url)


def stop_at(step: int, stage: str):
    """A queue's runner that asks the sweep to stop when a stage has come to a step."""

    def run(queue, on_interrupt) -> None:
        progressed = queue.progressed

        def listen(job, progress) -> None:
            progressed(job, progress)
            if job.stack.stages[0].name == stage and progress.step >= step:
                on_interrupt()

        queue.progressed = listen
        inline.run_inline(queue, on_interrupt)

    return run


# ---------------------------------------------------------------------------------- whole sweeps


def test_a_node_continues_from_an_artifact_and_a_checkpoint_of_another(
    spec, tmp_path, url, monkeypatch
):
    def refuse(url):
        raise AssertionError("a sweep without a storage asked for one")

    with monkeypatch.context() as alone:
        alone.setattr(storage, "url_to_fs", refuse)
        assert inline.sweep(spec, tmp_path / "whole").ok
    assert not [t for t in threading.enumerate() if t.name == "storage"]
    expected = inline.rows(tmp_path / "whole")
    monkeypatch.setenv("HARNESS_DB", f"sqlite:///{tmp_path / 'common.db'}")

    first = inline.sweep(spec, tmp_path / "a", [f"run.storage={url}"], stop_at(20, "student"))
    assert first.interrupted
    there = Storage(url)
    finished = {
        name: there.read(f"artifacts/{name}")
        for name in there.names("artifacts")
        if name.endswith(".json")
    }
    assert len(finished) == 4, "teacher and calibration of two seeds"
    students = storage.stages(there)
    assert len(students) == 2
    (tmp_path / "a").rename(tmp_path / "gone")

    second = inline.sweep(spec, tmp_path / "b", [f"run.storage={url}"])
    assert second.ok
    assert second.trained == 1, "one stack: the students"
    assert inline.rows(tmp_path / "b") == expected
    with inline.Store.open(Home.find(tmp_path / "b").database_url()) as store:
        segments = [[s["from_step"] for s in found] for found in store.runs()["segments"]]
    assert segments == [[0, 20], [0, 20]]
    for name, manifest in finished.items():
        assert there.read(f"artifacts/{name}") == manifest
        copy = tmp_path / "b" / "artifacts" / name.removesuffix(".json") / "manifest.json"
        assert copy.read_bytes() == manifest
    for left in ("work", "alive", "stop"):
        assert there.names(left) == [], "what is only needed on the way goes"


def test_a_driver_takes_in_the_rows_of_jobs_it_shares_no_disk_with(spec, tmp_path, url):
    assert inline.sweep(spec, tmp_path / "whole").ok
    for number in range(2):
        experiment = Shard(number, 2).of(load_experiment(spec, ["run.max_stack=1"]))
        home = node(tmp_path, f"job-{number}", url)
        done = work(experiment, home, None, lambda *_: None, lambda *_: None, home.stop_file())
        assert (done.stacks, done.failed) == (3, {})
        assert not list(home.work.glob("*/spool.jsonl"))
    summary = inline.sweep(spec, tmp_path / "driver", [f"run.storage={url}"])
    assert summary.ok
    assert summary.trained == 0
    assert inline.rows(tmp_path / "driver") == inline.rows(tmp_path / "whole")


def test_a_sweep_waits_for_another_on_the_storage_and_trains_nothing_again(
    spec, tmp_path, url, monkeypatch
):
    monkeypatch.setattr(storage, "LEASE_S", 0.6)
    monkeypatch.setattr(sweep, "BUSY_RETRY_S", 0.1)
    monkeypatch.setenv("HARNESS_DB", f"sqlite:///{tmp_path / 'common.db'}")
    inline.sweep(spec, tmp_path / "a", [f"run.storage={url}"], stop_at(20, "student"))
    elsewhere = Hold(node(tmp_path, "c", url), storage.stages(Storage(url)), "other").__enter__()
    outcomes = []

    def run(queue, on_interrupt) -> None:
        completed = queue.completed

        def listen(job, outcome, error="") -> None:
            completed(job, outcome, error)
            outcomes.append(outcome)
            if outcomes == ["busy"]:
                elsewhere.__exit__(None, None, None)
                assert inline.sweep(spec, tmp_path / "c", [f"run.storage={url}"]).ok

        queue.completed = listen
        inline.run_inline(queue, on_interrupt)

    summary = inline.sweep(spec, tmp_path / "b", [f"run.storage={url}"], run)
    assert summary.ok
    assert (outcomes, summary.trained) == (["busy"], 0)
    with inline.Store.open(Home.find(tmp_path / "b").database_url()) as store:
        assert [len(found) for found in store.runs()["segments"]] == [2, 2]


def test_the_storage_is_no_part_of_an_identity(spec, tmp_path, monkeypatch):
    ids = [[t.id for t in load_experiment(spec, o).trials] for o in ([], ["run.storage=s3://b"])]
    assert ids[0] == ids[1]
    monkeypatch.setenv("HARNESS_STORAGE", "s3://other/x")
    home = Home.find(tmp_path)
    assert (home.storage, home.shared("gs://b").storage) == ("s3://other/x", "gs://b")
    monkeypatch.chdir(tmp_path)
    assert home.shared("file://here").storage == f"file://{tmp_path}/here"
    assert home.shared("here").storage == f"{tmp_path}/here"
    monkeypatch.setenv("HARNESS_NODE_HOME", "/scratch/mine")
    assert home.on_this_node().root == Path("/scratch/mine")
    monkeypatch.delenv("HARNESS_STORAGE")
    assert Home.find(tmp_path).on_this_node() == Home.find(tmp_path)


# ---------------------------------------------------------------------------------------- objects


def files(folder: Path, content: bytes = b"x" * 1000) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "state").write_bytes(content)


def spooled(home: Home, steps: range, stage: str = STAGE) -> None:
    with Spool(home.spool(stage)) as spool:
        spool.append([MetricRecord("run-1", step, "loss", step / 7) for step in steps])


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if how == "truncated" else raw)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_objects_are_named_and_never_used(tmp_path, url, how):
    a, b, folder = node(tmp_path, "a", url), node(tmp_path, "b", url), tmp_path / "storage"
    storage.artifacts(a).publish(STAGE, files, {})
    spooled(a, range(5))
    with Hold(a, [STAGE], "one") as hold:
        for step in ("00000010", "00000020"):
            local = storage.checkpoints(a, STAGE).local
            local.publish(step, lambda f, s=step: files(f, s.encode()), {})
        hold.push_rows()
        hold.push_checkpoints(STAGE, ["00000010", "00000020"])
    assert storage.checkpoint_steps(b)(STAGE) == [10, 20]

    (blob,) = (folder / "artifacts" / STAGE).iterdir()
    damage(blob, how)
    with pytest.raises(
        StorageError,
        match=rf"{url}/artifacts/{STAGE}/\w+ is damaged: .*Delete "
        rf"{url}/artifacts/{STAGE}.json to have it made again",
    ):
        storage.artifacts(b).manifest(STAGE)
    assert not (b.artifacts / STAGE).exists()
    assert storage.artifacts(a).manifest(STAGE)["files"], "the node that made it has its own"

    work = f"{url}/work"
    (blob,) = (folder / "work" / STAGE / "checkpoints" / "00000020").iterdir()
    damage(blob, how)
    with pytest.raises(StorageError, match=rf"Delete {work}/{STAGE}/checkpoints/00000020.json"):
        storage.checkpoints(b, STAGE).manifest("00000020")
    Storage(url).remove(f"work/{STAGE}/checkpoints/00000020.json")
    assert storage.checkpoint_steps(b)(STAGE) == [10]
    previous = storage.checkpoints(b, STAGE)
    previous.verify("00000010")
    assert (previous.path("00000010") / "part" / "state").read_bytes() == b"00000010"

    damage(folder / "work" / STAGE / "checkpoints" / "00000010.json", how)
    with pytest.raises(ArtifactError, match=rf"{work}/.*00000010.json is damaged"):
        previous.manifest("00000010")

    (rows,) = (folder / "work" / STAGE / "rows").iterdir()
    damage(rows, how)
    with pytest.raises(StorageError, match=rf"{work}/{STAGE}/rows/.* is damaged.*Delete"):
        Hold(b, [STAGE], "one").__enter__()
    assert not b.spool(STAGE).exists()
    Storage(url).remove(f"artifacts/{STAGE}/{'0' * 64}")  # deleting what is absent is fine


def test_damaged_rows_of_one_stage_do_not_keep_a_driver_from_the_others(tmp_path, url):
    a, b = node(tmp_path, "a", url), node(tmp_path, "b", url)
    for stage in (STAGE, OTHER):
        spooled(a, range(3), stage)
        with Hold(a, [stage], "one") as hold:
            hold.push_rows()
    (rows,) = (tmp_path / "storage" / "work" / STAGE / "rows").iterdir()
    damage(rows, "flipped")
    with Store.open("sqlite://") as store:
        ingester = Ingester(store, b)
        ingester.leftovers()
    assert set(ingester.damaged) == {STAGE}
    work = f"{url}/work"
    assert f"{work}/{STAGE}/rows/{rows.name} is damaged" in ingester.damaged[STAGE]
    assert [ingester.has_all(stage) for stage in (STAGE, OTHER)] == [False, True]


class DyingFileSystem(LocalFileSystem):
    """Its process ends in the middle of a write."""

    protocol = "dying"

    def put_file(self, lpath, rpath, callback=None, **options):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path, value, mode="overwrite", **options):
        path = self._strip_protocol(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(value[: len(value) // 2])
        os._exit(9)


class FlakyFileSystem(LocalFileSystem):
    """Every operation raises the first `failures` times."""

    protocol = "flaky"
    failures = 0
    tries = 0

    def _maybe(self):
        type(self).tries += 1
        if self.tries <= self.failures:
            raise ConnectionResetError("the other side hung up")

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._maybe()
        super().pipe_file(path, value)

    def cat_file(self, path, start=None, end=None, **options):
        self._maybe()
        return super().cat_file(path, start, end)


fsspec.register_implementation("dying", DyingFileSystem, clobber=True)
fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


def test_an_upload_whose_process_dies_half_way_is_not_seen(tmp_path, url):
    """Of an artifact's file, of rows and of a manifest, each in a process that really dies."""
    a, b = node(tmp_path, "a", url), node(tmp_path, "b", url)
    a_local = storage.SharedArtifacts(Storage(url), a, a.artifacts).local
    a_local.publish(STAGE, files, {})
    dying = Storage(f"dying://{tmp_path / 'storage'}")

    def dies(action) -> None:
        child = os.fork()
        if child == 0:
            action()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    dies(lambda: storage.SharedArtifacts(dying, a, a.artifacts).has(STAGE))
    assert list((tmp_path / "storage" / "artifacts" / STAGE).iterdir()), "half of a file is there"
    rows = f"work/{STAGE}/rows"
    dies(lambda: dying.write(f"{rows}/000001-{'0' * 16}-000000-{'0' * 64}", b"rows" * 100))
    dies(lambda: dying.write(f"artifacts/{STAGE}.json", b"manifest" * 100))
    assert len(list((tmp_path / "storage" / rows).iterdir())) == 1
    assert Storage(url).names(rows) == []
    assert not storage.artifacts(b).has(STAGE)
    assert storage.artifacts(b).ids() == []
    assert storage.artifacts(a).present([STAGE, OTHER]) == {STAGE}, "the node that has it pushes"
    storage.artifacts(b).verify(STAGE)


def test_a_storage_that_fails_twice_is_asked_a_third_time(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(storage, "PAUSES_S", (0.5, 2.0, 8.0))
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    flaky = Storage(f"flaky://{tmp_path / 'storage'}")
    for failures, method in ((2, lambda: flaky.write("a/b", b"1")), (2, lambda: flaky.read("a/b"))):
        monkeypatch.setattr(FlakyFileSystem, "tries", 0)
        monkeypatch.setattr(FlakyFileSystem, "failures", failures)
        method()
    assert slept == [0.5, 2.0] * 2
    monkeypatch.setattr(FlakyFileSystem, "failures", 10**6)
    with pytest.raises(
        StorageError,
        match=rf"cannot read flaky://{tmp_path}/storage/a/b: ConnectionResetError: the other side "
        r"hung up\. Check the URL \(run\.storage or HARNESS_STORAGE\).*same command continues",
    ):
        flaky.read("a/b")
    assert slept == [0.5, 2.0] * 2 + [0.5, 2.0, 8.0]
    with pytest.raises(FileNotFoundError):
        Storage(f"file://{tmp_path}").read("absent")


def test_preflight_tries_the_storage_and_names_a_missing_package(tmp_path, monkeypatch):
    check = preflight.storage(node(tmp_path, "a", "memory://preflight"))
    assert (check.state, check.text) == ("ok", "memory://preflight can be written")
    assert Storage("memory://preflight").names("probe") == []
    known = {"class": "no_such_driver.FileSystem", "err": "Install no_such_driver to use it"}
    monkeypatch.setitem(known_implementations, "nodriver", known)
    check = preflight.storage(node(tmp_path, "a", "nodriver://user:secret@bucket/x"))
    assert check.state == "bad"
    assert "nodriver://user:***@bucket/x" in check.text
    assert "Install no_such_driver to use it: pip install no_such_driver" in check.text
    check = preflight.storage(node(tmp_path, "a", "nonsense://x"))
    assert (check.state, "Protocol not known" in check.text) == ("bad", True)
    monkeypatch.setattr(FlakyFileSystem, "failures", 10**6)
    check = preflight.storage(node(tmp_path, "a", f"flaky://{tmp_path}/x"))
    assert (check.state, "ConnectionResetError" in check.text) == ("bad", True)


# -------------------------------------------------------------------------------------- ownership


def test_a_stage_is_taken_over_from_the_same_sweep_and_from_the_dead_alone(
    tmp_path, url, monkeypatch
):
    monkeypatch.setattr(storage, "LEASE_S", 0.6)
    a, b = node(tmp_path, "a", url), node(tmp_path, "b", url)
    first = Hold(a, [STAGE], "one").__enter__()
    spooled(a, range(3))
    first.push_rows()
    with pytest.raises(StackBusyError, match=f'{STAGE}: .*"sweep": "one"'):
        Hold(b, [STAGE], "two").__enter__()
    first.push_rows()  # still its own

    with Hold(b, [STAGE], "one") as again:  # the driver saw its worker die
        assert b.spool(STAGE).read_bytes() == a.spool(STAGE).read_bytes()
        spooled(a, range(3, 5))
        with pytest.raises(StackBusyError, match="was taken over"):
            first.push_rows()
        spooled(b, range(3, 9))
        again.push_rows()
        again.push_rows()  # nothing is pushed twice
    rows = b"".join(data for _, data in storage.new_rows(Storage(url), STAGE, ()))
    assert rows == b.spool(STAGE).read_bytes()
    first.__exit__(None, None, None)

    dead = Hold(a, [STAGE], "one").__enter__()
    assert a.spool(STAGE).read_bytes() == rows, "what was never pushed is forgotten"
    dead._over.set()  # no sign of life from here on
    dead._thread.join()
    with Hold(b, [STAGE], "two"), pytest.raises(StackBusyError):
        dead.push_checkpoints(STAGE, [])


def test_half_a_line_that_a_killed_writer_left_is_not_pushed(tmp_path, url):
    a = node(tmp_path, "a", url)
    spooled(a, range(3))
    with a.spool(STAGE).open("ab") as file:
        file.write(b'{"kind": "metrics", "run_id": "torn')
    with Hold(a, [STAGE], "one") as hold:
        spooled(a, range(3, 5))
        hold.push_rows()
    rows = b"".join(data for _, data in storage.new_rows(Storage(url), STAGE, ()))
    assert rows == a.spool(STAGE).read_bytes()
    assert [record.step for record in parse(rows, url)] == list(range(5))


def test_what_a_process_of_another_node_is_at_is_not_cleaned_up(tmp_path, url):
    a, b = node(tmp_path, "a", url), node(tmp_path, "b", url)
    with Hold(a, [STAGE], "one") as hold:
        spooled(a, range(3))
        hold.push_rows()
        assert not storage.forget(b, STAGE)
        hold.push_rows()  # still its own
    assert storage.forget(b, STAGE)
    assert Storage(url).names("work") == []
    assert not b.stage(STAGE).exists()


def test_a_sweep_is_asked_to_stop_through_the_storage(tmp_path, url, monkeypatch):
    monkeypatch.setattr(storage, "STOP_CHECK_S", 0.02)
    a, b = node(tmp_path, "a", url), node(tmp_path, "b", url)
    with Hold(a, [STAGE], "one") as hold, Hold(a, [OTHER], "two") as other:
        storage.ask_to_stop(b, "one")
        assert wait_for(lambda: hold.asked_to_stop)
        assert not other.asked_to_stop
    storage.was_stopped(b, "one")
    assert Storage(url).names("stop") == Storage(url).names("alive") == []


# ------------------------------------------------------------------------------------ a real Ray


RAY_SPEC = """
name: nodes
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-3
steps: 600
evaluation: {every: 200, episodes: 3}
run: {log_every: 50, checkpoint_every: 100, compile: "off", device: cpu, max_stack: 1}
"""


@pytest.mark.slow
def test_nodes_that_share_no_folder_end_with_the_rows_of_one(bandit, tmp_path, url, monkeypatch):
    """A sweep on two Ray nodes whose homes differ, and the driver's from both."""
    spec, homes = tmp_path / "nodes.yaml", tmp_path / "homes"
    spec.write_text(RAY_SPEC)
    assert inline.sweep(spec, tmp_path / "whole").ok
    monkeypatch.setenv("HARNESS_NODE_HOME", str(homes))
    (tmp_path / "cluster").mkdir()
    started = cluster.up(tmp_path / "cluster", nodes=2, cpus=1)
    try:
        environment = {**os.environ, **started.environment, "HARNESS_STORAGE": url}
        environment.pop("HARNESS_NODE_HOME")
        home = tmp_path / "driver"
        process = harness("sweep", str(spec), "--home", str(home), env=environment)

        def working() -> int:
            return sum(bool(ray_workers(node.pid)) for node in started.nodes)

        assert wait_for(lambda: working() == 2, 300.0, process), "both nodes were to train"
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    finally:
        assert cluster.down(tmp_path / "cluster") >= 1
    assert inline.rows(home) == inline.rows(tmp_path / "whole")
    made = [{path.name for path in homes.glob(f"{n}/artifacts/*")} for n in range(2)]
    assert all(made), "each node trained in its own home"
    assert not made[0] & made[1]
    assert not list(home.glob("artifacts/*")), "the driver has no artifact of its own"
