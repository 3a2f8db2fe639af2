"""The Ray cluster a stage works on: the one RAY_ADDRESS names, or a quiet one of its own on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpar_core.system import cpus

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
_OBJECT_STORE_BYTES = 200 * 2**20  # stages pass addresses and counts through Ray, not data


def local_cpus() -> int:
    """Return the CPUs that this process may use."""
    return cpus()


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


def expected() -> list[Node] | None:
    """Return the nodes of the cluster that `connected` would start here, None when it would join another."""
    _quiet()
    if os.environ.get("RAY_ADDRESS") or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return None
    import torch

    return [Node(local_cpus(), torch.cuda.device_count())]


@contextmanager
def connected() -> Iterator[list[Node]]:
    """Connect to Ray and yield the cluster's nodes; on leaving, disconnect (an own cluster ends).

    Inside a Ray process, or when the caller is connected already, that connection is used and left alone.
    Raises ConnectionError in one sentence when RAY_ADDRESS does not answer.
    """
    _quiet()
    import ray

    mine = not ray.is_initialized()
    if mine:
        _start(os.environ.get("RAY_ADDRESS"))
    try:
        yield [
            Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]
        ]
    finally:
        if mine:
            ray.shutdown()


def _quiet() -> None:
    """Set what Ray reads; before it is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def _start(address: str | None) -> None:
    import ray

    quiet = {"logging_config": ray.LoggingConfig(log_level="ERROR"), "log_to_driver": False}
    if address is None:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=local_cpus(),
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): start it, or unset "
            "RAY_ADDRESS to work on this machine alone"
        ) from error


def require(nodes: list[Node], *, workers: int, cpus: float, gpus: float, section: str, option: str | None = None) -> None:
    """Refuse what the cluster can never place, before anything waits for it. Raises ValueError in one sentence.

    section: the params section that asked, as "train" or "entropy_model.train". option: the option that asked instead.
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
