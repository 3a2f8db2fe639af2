"""What a stage asks of its machine, under the names that MLflow's page of system metrics reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FIRST_SECONDS, SHARE = 5.0, 0.01  # until the first sample; afterwards each interval is this share of the time so far


@contextmanager
def system_metrics(record: Callable[[Mapping[str, float], int], None]) -> Iterator[None]:
    """Call `record` with values and their number as long as the block runs, some hundred times a week, and at its end."""
    stop = threading.Event()
    thread = threading.Thread(target=_sample, args=(record, stop), name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _sample(record: Callable[[Mapping[str, float], int], None], stop: threading.Event) -> None:
    import psutil

    began, count, gpus = time.monotonic(), 0, _gpus()
    psutil.cpu_percent()  # the first call begins to count
    network = psutil.net_io_counters()
    while True:
        stopped = stop.wait(max(FIRST_SECONDS, SHARE * (time.monotonic() - began)))
        if stopped and time.monotonic() - began < 1:
            return
        try:
            values = _values(psutil, network) | {name: value for gpu in gpus for name, value in gpu().items()}
            record({f"system/{name}": value for name, value in values.items()}, count)
        except (OSError, ValueError, psutil.Error):
            return  # the disk is full or the journal closed, which the stage itself reports, or the system gives no numbers
        if stopped:
            return
        count += 1


def _values(psutil: Any, network: Any) -> dict[str, float]:
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(".")
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if network is not None:  # as in a sandbox without a network
        now = psutil.net_io_counters()
        values["network_receive_megabytes"] = (now.bytes_recv - network.bytes_recv) / 1e6
        values["network_transmit_megabytes"] = (now.bytes_sent - network.bytes_sent) / 1e6
    return values


def _gpus() -> list[Callable[[], dict[str, float]]]:
    """Return a reader for each NVIDIA GPU of this machine; none where the package nvidia-ml-py or the driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:
        return []

    def reader(index: int, handle: Any) -> Callable[[], dict[str, float]]:
        def read() -> dict[str, float]:
            try:
                memory, load = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            except pynvml.NVMLError:  # a GPU in parts (MIG) does not tell its load
                return {}
            return {
                f"gpu_{index}_utilization_percentage": load,
                f"gpu_{index}_memory_usage_megabytes": memory.used / 1e6,
                f"gpu_{index}_memory_usage_percentage": 100 * memory.used / memory.total,
            }

        return read

    return [reader(index, handle) for index, handle in enumerate(handles)]
