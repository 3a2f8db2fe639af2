"""Batches made ahead of time, so that a training step never waits for data."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpar_core.patches.layout import PatchLayout


class Batch(NamedTuple):
    """Images of one micro-batch.

    tokens: (b, T) int64.
    labels: (b,) int64 or None.
    layout: their patches, for DPAR.
    """

    tokens: Tensor
    labels: Tensor | None = None
    layout: PatchLayout | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device (from pinned memory: a copy that does not wait)."""
        if device.type == "cpu":
            return self
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in pinned memory."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed."""
        labels = None if self.labels is None else change(self.labels)
        return Batch(change(self.tokens), labels, None if self.layout is None else self.layout.each(change))


AHEAD = 2


class Prefetcher:
    """Makes the micro-batches of coming steps in a thread, at most AHEAD steps in advance.

    Use as a context manager: leaving it stops the thread. `waited`: seconds that the last `next` waited.
    """

    def __init__(
        self,
        micro_batch: Callable[[int, int], Batch],
        *,
        first: int,
        last: int,
        micros: int,
        device: torch.device,
    ) -> None:
        self.waited = 0.0
        self._make, self._steps, self._micros, self._device = micro_batch, range(first, last), micros, device
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def next(self) -> list[Batch]:
        """Return the micro-batches of the next step, on the device. Raises the error that stopped the thread, if any."""
        started = time.perf_counter()
        ready = self._ready.get()
        self.waited = time.perf_counter() - started
        if isinstance(ready, BaseException):
            raise ready
        return [batch.to(self._device) for batch in ready]

    def _work(self) -> None:
        for step in self._steps:
            try:
                batches = [self._make(step, micro) for micro in range(self._micros)]
                pin = self._device.type == "cuda"
                made: list[Batch] | BaseException = [batch.pinned() for batch in batches] if pin else batches
            except BaseException as error:  # handed to the thread that waits for it
                made = error
            while not self._stop.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(made, BaseException):
                return
