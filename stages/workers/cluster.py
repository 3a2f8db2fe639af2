"""The Ray cluster a stage works on: the one RAY_ADDRESS names, or a quiet one of its own on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpar_core.secrets import redacted
from dpar_core.system import cpus
from stages.workers.child import command

# What Ray reads at import or start. A value the user has set in the environment wins.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # Ray Train's actors need processes of their own
    "RAY_enable_worker_prestart": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the rate at which reports are fetched: twice that of the workers
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
SLOW_SECONDS = 20.0  # after which a start of Ray is reported as slow; Ray's own patience is 30 s
_WAY_OUT = "free memory and processors, look at `ulimit -n` and `ulimit -u`, or use one worker, which needs no Ray cluster"
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 25.0  # to reach a cluster's port; to be let into the cluster
_FOLDER = "dpar-ray"
_LONGEST_FOLDER = 45  # characters: the paths of Ray's sockets below it end at 107
_CODE = Path(__file__).resolve().parents[2]
_OBJECT_STORE_BYTES = 200 * 2**20  # stages pass addresses and counts through Ray, not data


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    cpus: float
    gpus: float

    def fits(self, *, cpus: float, gpus: float) -> int:
        """Return how many workers of a size it holds."""
        by_cpus = self.cpus / cpus if cpus else float("inf")
        by_gpus = self.gpus / gpus if gpus else float("inf")
        return int(min(by_cpus, by_gpus))


def foreign_address() -> str | None:
    """Return the RAY_ADDRESS to join, None for a cluster of our own: without one, or with `local`, Ray's word for that."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def expected() -> list[Node] | None:
    """Return the nodes of the cluster that `connected` would start here, None when it would join another."""
    _quiet()
    if foreign_address() or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return None
    import torch

    return [Node(cpus(), torch.cuda.device_count())]


@contextmanager
def connected() -> Iterator[list[Node]]:
    """Connect to Ray and yield the cluster's nodes; on leaving, disconnect (an own cluster ends).

    Inside a Ray process, or when the caller is connected already, that connection is used and left alone.
    Raises ConnectionError in one sentence when RAY_ADDRESS does not answer or does not let us in, RuntimeError when Ray
    cannot start here.
    """
    _quiet()
    import ray

    if ray.is_initialized():
        yield living_nodes()
        return
    with _started(foreign_address()):
        yield living_nodes()


def living_nodes() -> list[Node]:
    """Return the nodes of the cluster that this process is connected to."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in alive]


def _quiet() -> None:
    """Set what Ray reads; before it is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if foreign_address() is None:
        _keep_token_private()


def _keep_token_private() -> None:
    """Make the token of an own cluster readable for this user alone: Ray itself writes it with the rights of any file."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
                stream.write(uuid.uuid4().hex)
        except FileExistsError:
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
    except OSError:  # a home that cannot be written: a token for this process and its children
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}


@contextmanager
def _started(address: str | None) -> Iterator[None]:
    """Start or join a cluster, and leave nothing of it behind."""
    import ray

    if address is None:
        folder = _own_folder()
        options = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": cpus(),
            "object_store_memory": _OBJECT_STORE_BYTES,
            **({"_temp_dir": str(folder)} if folder else {}),
        }
    else:
        _ask(address)
        folder, options = None, {"address": address}
    notice = f"Ray is still starting after {SLOW_SECONDS:g} s, and gives up soon if it cannot: {_WAY_OUT}"
    slow = threading.Timer(SLOW_SECONDS, partial(print, notice, file=sys.stderr, flush=True))
    slow.daemon = True
    agents = None
    try:
        if address is None:  # another cluster has answered already
            slow.start()
        try:
            # Ray puts the current folder first on the path of its workers: they run our code, not what lies there.
            with contextlib.chdir(_CODE):
                ray.init(logging_config=ray.LoggingConfig(log_level="ERROR"), log_to_driver=False, **options)
        except Exception as error:
            raise _refusal(address, type(error).__name__, str(error)) from error
        finally:
            slow.cancel()
        agents = None if address else _agents_of_own()
        yield
    finally:
        ray.shutdown()
        if agents is not None:
            agents.communicate()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _agents_of_own() -> subprocess.Popen[bytes] | None:
    """Return a process that ends the agents of an own cluster when its input closes, as where this process is killed.

    Ray's other processes end by themselves then; its agents would first try for a minute to report it to a server that is
    gone. None on Windows.
    """
    if sys.platform == "win32":
        return None
    import psutil

    raylets = [one for one in psutil.Process().children() if one.name() == "raylet"]
    agents = [str(agent.pid) for one in raylets for agent in one.children()]
    words, nothing = ["sh", "-c", 'read line; kill -9 "$@"', "sh", *agents], subprocess.DEVNULL
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True)


def _own_folder() -> Path | None:
    """Return a new folder for an own cluster's session, which Ray would leave in /tmp/ray; None where paths are too long.

    Folders of processes that were killed are removed.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    mine = f"{_FOLDER}-{os.getuid()}-"
    for old in base.glob(f"{mine}*"):
        with contextlib.suppress(OSError, ValueError):
            if old.stat().st_uid == os.getuid() and not _is_alive(int(old.name.removeprefix(mine).split("-")[0])):
                shutil.rmtree(old, ignore_errors=True)
    if len(str(base)) + len(mine) + 16 > _LONGEST_FOLDER:
        return None
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=base))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _ask(address: str) -> None:
    """Raise ConnectionError when the cluster at an address does not let us in within seconds.

    Ray's own ways end after minutes, or end the process: its port is tried first, then a process beside this one joins.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    reached = bool(host) and port.isdigit()
    if reached:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise _refusal(address, type(error).__name__, str(error)) from error
    try:
        found = subprocess.run(
            command(__name__, address),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(address, "TimeoutError", f"no answer within {ANSWER_SECONDS:g} s", reached=reached) from None
    lines = [line for line in found.stdout.splitlines() if line.startswith("{")]
    said = [line.strip() for line in found.stderr.splitlines() if line.strip()] or ["no reason given"]
    died = [line.partition("what(): ")[2] for line in said if "what(): " in line]  # before a list of calls and modules
    answer = json.loads(lines[-1]) if lines else {"kind": "RaySystemError", "text": (died or said)[-1]}
    if answer:
        raise _refusal(address, answer["kind"], answer["text"], reached=reached)


def main() -> None:
    """Join the cluster that is named, leave it, and print {} or the error of Ray as JSON."""
    address = sys.argv[1]
    _quiet()
    import ray

    answer = {}
    try:
        ray.init(address=address, logging_config=ray.LoggingConfig(log_level="ERROR"), log_to_driver=False)
        ray.shutdown()
    except Exception as error:
        answer = {"kind": type(error).__name__, "text": str(error)}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # Ray's threads may hang where its cluster does


def _refusal(address: str | None, kind: str, text: str, *, reached: bool = False) -> OSError | RuntimeError:
    """Turn an error of Ray into one sentence with the way out. reached: something listens at the address."""
    first = redacted(" ".join(text.split()))[:250].rstrip(" .:")
    if address is None:
        return RuntimeError(f"Ray could not start on this machine ({kind}: {first}): {_WAY_OUT}")
    shown = redacted(address)
    if "Authentication" in kind or "nauthenticated" in text or "auth_token" in text or "InvalidAuthToken" in text:
        return ConnectionError(
            f"the Ray cluster at RAY_ADDRESS={shown} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to the token of the cluster, which `ray get-auth-token` prints on its head"
        )
    if "ersion mismatch" in text:
        return ConnectionError(
            f"the Ray cluster at RAY_ADDRESS={shown} runs other versions ({first}): install the same on all nodes, with "
            "`-c constraints.txt`"
        )
    if reached and "Permission denied" in text:
        return ConnectionError(
            f"the Ray cluster at RAY_ADDRESS={shown} was started on this machine by another user, and Ray cannot write "
            f"there ({first}): join it from another machine, have it started by this user, or unset RAY_ADDRESS to work on "
            "this machine alone"
        )
    if reached:  # without a token, or with a wrong one, Ray speaks of time alone
        return ConnectionError(
            f"something listens at RAY_ADDRESS={shown}, but does not let us into a Ray cluster ({first}): if the "
            "cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the one that "
            "`ray get-auth-token` prints on its head; else look at it, or unset RAY_ADDRESS to work on this machine alone"
        )
    return ConnectionError(
        f"no Ray cluster answers at RAY_ADDRESS={shown} ({first}): start it, or unset RAY_ADDRESS to work on this machine "
        "alone"
    )


def require(nodes: list[Node], *, workers: int, cpus: float, gpus: float, section: str, option: str | None = None) -> None:
    """Refuse what the cluster can never place, before anything waits for it. Raises ValueError in one sentence.

    section: the params section that asked, as "train" or "entropy_model.train".
    option: the option that asked instead.
    """
    room = sum(node.fits(cpus=cpus, gpus=gpus) for node in nodes)
    if room >= workers or _autoscales():
        return
    has = f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs"
    size = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    asked = option or f"{section}.workers"
    raise ValueError(
        f"`{asked}` asks for {workers} workers of {size} each, but the cluster has {has} on {len(nodes)} "
        f"node{'s' if len(nodes) != 1 else ''}, room for {room}: lower it, or start a larger cluster and set "
        "RAY_ADDRESS"
    )


def _autoscales() -> bool:
    """Whether the cluster may grow: then Ray Train itself checks against its largest size."""
    import ray
    from ray._private.state import state  # private, and what Ray Train itself asks

    return ray.is_initialized() and bool(state.get_max_resources_from_cluster_config())
