"""A Ray cluster of two nodes on one machine, each in a network namespace of its own, joined by a cable that can be cut.

Linux, with the right to make namespaces (root, or CAP_SYS_ADMIN and CAP_NET_ADMIN).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.faults import processes
from tests.helpers.paths import ROOT

ADDRESSES = {"head": "10.231.0.1", "node": "10.231.0.2"}
PORT = 6379
NEW_NETWORK = 0x40000000  # of setns: the kind of namespace
# Two seconds without an answer and a node counts as lost, instead of half a minute.
DETECTION = {"period_ms": 500, "timeout_ms": 500, "failure_threshold": 4, "initial_delay_ms": 1000}
LOST_SECONDS = 3.0
START_SECONDS = 90.0


def why_not() -> str | None:
    """Return why this machine cannot have such a cluster, None where it can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and `ip` (iproute2)"
    name = f"dpar-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class Nodes:
    """A head and a node of one CPU each. environment: what a driver needs to join; it has to be in the head's namespace."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dpar-nodes-"))  # short, as the paths of sockets are below it
        self._name = f"{os.getpid()}"  # of the process that makes them, not of those it forks
        self._began: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            "RAY_ADDRESS": f"{ADDRESSES['head']}:{PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        }
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        _ip("link", "add", self._cable("head"), "type", "veth", "peer", "name", self._cable("node"))
        for which, address in ADDRESSES.items():
            _ip("netns", "add", self._space(which))
            _ip("link", "set", self._cable(which), "netns", self._space(which))
            _ip("-n", self._space(which), "link", "set", "lo", "up")
            _ip("-n", self._space(which), "addr", "add", f"{address}/24", "dev", self._cable(which))
        self.mend()
        self._start("head", "--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}/ray")
        self._start_node()

    def _space(self, which: str) -> str:
        return f"dpar-{self._name}-{which}"

    def _cable(self, which: str) -> str:
        return f"dp{self._name}{which[0]}"

    def _start(self, which: str, *words: str) -> None:
        log = self.folder / f"{which}.log"
        detection = {f"RAY_health_check_{name}": str(value) for name, value in DETECTION.items()}
        environment = {
            **os.environ,
            **self.environment,
            **detection,
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        del environment["RAY_ADDRESS"]
        ray = [sys.executable, "-P", "-c", "from ray.scripts.scripts import main; main()", "start", *words, "--block"]
        ray += [f"--node-ip-address={ADDRESSES[which]}", "--num-cpus=1", f"--object-store-memory={80 * 2**20}"]
        with open(log, "wb") as stream:
            self._began[which] = subprocess.Popen(
                ["ip", "netns", "exec", self._space(which), *ray],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        processes.KEPT.add(self._began[which].pid)
        until = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if self._began[which].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"Ray's {which} does not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)

    def _start_node(self) -> None:
        self._start("node", f"--address={self.environment['RAY_ADDRESS']}")

    def enter(self) -> None:
        """Take this process into the namespace of the head."""
        with open(f"/run/netns/{self._space('head')}") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns")

    def at_work(self, which: str) -> list[str]:
        """Return the names of a node's workers that are not idle."""
        named = [" ".join(processes.words_of(psutil.Process(pid))) for pid in self._pids(which) if psutil.pid_exists(pid)]
        of_ray = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return [name.strip() for name in named if name.startswith("ray::") and not name.startswith(of_ray)]

    def _pids(self, which: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._space(which)).split()]

    def kill(self, which: str = "node") -> None:
        """Kill a node with everything on it."""
        while pids := self._pids(which):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if which in self._began:
            self._began[which].wait()
            processes.KEPT.discard(self._began.pop(which).pid)

    def cut(self) -> None:
        _ip("-n", self._space("node"), "link", "set", self._cable("node"), "down")

    def mend(self) -> None:
        """Join the two again; on the first call they are joined."""
        for which in ADDRESSES:
            _ip("-n", self._space(which), "link", "set", self._cable(which), "up")
            # Where nothing else is: Ray learns its own address from the way to one outside.
            _ip("-n", self._space(which), "route", "replace", "default", "dev", self._cable(which))

    def whole(self, *, lost: bool) -> None:
        """Bring the node back. lost: Ray has noticed that it was away, and takes no node that was dead back as it is."""
        self.mend()
        if lost or "node" not in self._began or self._began["node"].poll() is not None:
            time.sleep(3)  # in which a node that was cut off learns that it counts as dead
            self.kill()
            self._start_node()

    def close(self) -> None:
        """Kill what runs on both nodes and remove their namespaces, and with those the cable."""
        for which in ADDRESSES:
            if Path(f"/run/netns/{self._space(which)}").exists():
                self.kill(which)
                _ip("netns", "del", self._space(which))
        shutil.rmtree(self.folder, ignore_errors=True)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
