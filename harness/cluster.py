"""A Ray cluster of several nodes on this machine: to try out, and to test, what a cluster does.

Every node is one `ray start --block` with all its processes, on loopback. Ports and the temporary
folder are the cluster's own, so that it neither meets another user's nor is met by it, and `down`
ends exactly the processes that `up` started. Does not import ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

STATE = "cluster.json"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
OBJECT_STORE_BYTES = 128 << 20
"""Of each node: nothing large goes through Ray, and its default is a third of the machine."""
_STARTED = "Ray runtime started"


class ClusterError(RuntimeError):
    """A local cluster cannot be started, or runs already; the message says what to do."""


@dataclass(frozen=True)
class Node:
    """The process that a node's other processes descend from."""

    pid: int
    created: float  # seconds since 1970: the same number never names another process

    def process(self) -> psutil.Process | None:
        """None if it has ended."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid)
            if found.create_time() == self.created and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None


@dataclass(frozen=True)
class LocalCluster:
    """A started cluster, as `cluster.json` in the home folder keeps it."""

    environment: dict[str, str]  # what a driver needs: address and token
    scratch: str  # Ray's temporary folder, of this cluster alone
    nodes: tuple[Node, ...]  # the first is the head

    def save(self, folder: Path) -> None:
        """Remembers the cluster for `find` and `down`."""
        (folder / STATE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def up(folder: Path, nodes: int, cpus: int = 0) -> LocalCluster:
    """Starts a cluster and returns when all its nodes have joined.

    Where `HARNESS_NODE_HOME` is set, each node's is a folder of its own in it.

    Args:
        folder: where it is remembered until `down`; one cluster each.
        nodes: how many, with the head; all of them run trials.
        cpus: of each node, as Ray counts them; 0 shares the machine's among them, at least 1.

    Raises:
        ValueError: for fewer than one node or a negative number of CPUs.
        ClusterError: if one runs already, or a node does not start; then nothing is left behind.
    """
    if nodes < 1 or cpus < 0:
        raise ValueError(f"{nodes} nodes with {cpus} CPUs; expected at least 1 node and 0 CPUs")
    running = find(folder)
    if running is not None:
        raise ClusterError(
            "a cluster of this home folder runs already, at "
            f"{running.environment['RAY_ADDRESS']}; use it, or end it with `harness cluster down`"
        )
    # Short: Ray puts sockets there, whose paths may have about 100 characters.
    scratch = tempfile.mkdtemp(prefix="harness-ray-")
    cpus = cpus or max(1, (os.cpu_count() or 1) // nodes)
    port, client_port = _free_ports(2)
    address = f"{_host(0)}:{port}"
    head = ["--head", f"--port={port}", f"--temp-dir={scratch}", "--include-dashboard=false"]
    if importlib.util.find_spec("grpc"):  # Ray has a client server then, at a fixed port
        head.append(f"--ray-client-server-port={client_port}")
    # Whoever reaches the port of a Ray cluster runs code in it: other users of this machine, say.
    token = Path(scratch) / "token"
    token.write_text(secrets.token_hex(32), encoding="ascii")
    environment = {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    started: list[Node] = []
    try:
        for number in range(nodes):
            role = head if number == 0 else [f"--address={address}"]
            log = Path(scratch) / f"node-{number}.log"
            role = [*role, f"--num-cpus={cpus}", f"--node-ip-address={_host(number)}"]
            own = os.environ.get("HARNESS_NODE_HOME")
            homes = {"HARNESS_NODE_HOME": f"{own}/{number}"} if own else {}
            started.append(_start_node(role, log, environment | homes))
            cluster = LocalCluster(environment, scratch, tuple(started))
            cluster.save(folder)
            _wait_until_started(started[-1], log)
    except BaseException:
        _end(started)
        (folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return cluster


def find(folder: Path) -> LocalCluster | None:
    """The cluster that was started from a folder, if any node of it still runs."""
    try:
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        nodes = tuple(Node(**node) for node in saved["nodes"])
        cluster = LocalCluster(saved["environment"], saved["scratch"], nodes)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{folder / STATE} cannot be read ({error}); end the cluster's processes by hand and "
            "delete the file"
        ) from error
    return cluster if any(node.process() for node in nodes) else None


def down(folder: Path) -> int:
    """Ends the processes of the cluster of this folder, and no others; returns how many nodes.

    A cluster that is not there any more, or was never started, is 0 nodes.
    """
    cluster = find(folder)
    ended = 0
    if cluster is not None:
        ended = _end(cluster.nodes)
        shutil.rmtree(cluster.scratch, ignore_errors=True)
    (folder / STATE).unlink(missing_ok=True)
    return ended


def _start_node(arguments: list[str], log: Path, variables: dict[str, str]) -> Node:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    command += [*arguments, "--block", "--disable-usage-stats"]
    # Any free port: nodes of one machine would else take the same ones from a fixed range.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    # `ray start` would take RAY_ADDRESS for a cluster that is there already.
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C meant for a sweep does not end the cluster
        )
    return Node(process.pid, psutil.Process(process.pid).create_time())


def _wait_until_started(node: Node, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while _STARTED not in (text := log.read_text(encoding="utf-8", errors="replace")):
        if node.process() is None or time.monotonic() > deadline:
            last = " ".join(text.strip().splitlines()[-3:])
            raise ClusterError(f"a node of the local cluster did not start: {last or 'no output'}")
        time.sleep(0.1)


def _end(nodes: Iterable[Node]) -> int:
    """Ends nodes with everything below them; the head, which the others need, last."""
    count = 0
    for node in reversed(list(nodes)):
        process = node.process()
        if process is None:
            continue
        count += 1
        family = [process]
        with contextlib.suppress(psutil.Error):
            family += process.children(recursive=True)
        with contextlib.suppress(psutil.Error):
            process.terminate()  # it ends its children in order
        for left in psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)[1]:
            with contextlib.suppress(psutil.Error):
                left.kill()
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    return count


def _host(number: int) -> str:
    """Loopback addresses; Ray exchanges 127.0.0.1 for one that other machines can reach."""
    return f"127.0.0.{2 + number}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_host(0), 0))
        return [one.getsockname()[1] for one in sockets]
