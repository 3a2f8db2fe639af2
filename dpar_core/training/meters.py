"""What a training loop measures without waiting for the device: losses, bad losses, time, memory, peak speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dpar_core.models import flops
from dpar_core.precision import measured_peak
from dpar_core.system import resident_bytes
from dpar_core.training.prefetch import Batch


class MeanLoss:
    """A mean over steps, summed on the device in float64 and read only on demand."""

    def __init__(self, device: torch.device, total: float = 0.0, steps: int = 0) -> None:
        self._total = torch.tensor(total, dtype=torch.float64, device=device)
        self._steps = steps

    def add(self, value: Tensor) -> None:
        """Add the loss of one step: () float."""
        self._total += value
        self._steps += 1

    def peek(self) -> tuple[float, int]:
        """Return the sum and the number of steps so far."""
        return float(self._total), self._steps

    def take(self) -> float:
        """Return the mean and begin anew."""
        mean = float(self._total) / max(self._steps, 1)
        self._total.zero_()
        self._steps = 0
        return mean


class BadLoss(NamedTuple):
    step: int
    loss: float
    norm: float


class Guard:
    """Watches losses on the device. Once one is bad, `bad` is 1 for good; the optimizer skips its updates by it.

    A loss is bad when it or the gradient norm is not finite, or it lies above `largest_loss` (nats per token).
    """

    def __init__(self, largest_loss: float, device: torch.device) -> None:
        self.bad = torch.zeros((), device=device)
        self._largest_loss = largest_loss
        self._seen = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)

    def look(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Judge a step by its loss and gradient norm, both () float on the device."""
        good = torch.isfinite(loss) & torch.isfinite(norm) & (loss <= self._largest_loss)
        new = torch.stack([torch.full_like(loss, step), loss, norm.to(loss)]).double()
        self._seen = torch.where((self.bad == 0) & ~good, new, self._seen)
        self.bad = torch.maximum(self.bad, (~good).to(self.bad))

    def read(self) -> BadLoss | None:
        """Return the first bad step, None when all were good. Waits for the device."""
        step, loss, norm = self._seen.tolist()
        return None if step < 0 else BadLoss(int(step), loss, norm)


class Clock:
    """Seconds of training; stands still while `paused`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._seconds + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._seconds = self.seconds
        try:
            yield
        finally:
            self._since = time.perf_counter()


class Counts:
    """What this rank has trained on since the last log line."""

    def __init__(self, seconds: float) -> None:
        self.began = seconds
        self.steps = self.images = self.tokens = self.patches = 0
        self.waited = 0.0

    def add(self, micros: list[Batch], waited: float) -> None:
        self.steps += 1
        self.waited += waited
        for batch in micros:
            self.images += len(batch.tokens)
            self.tokens += batch.tokens.numel()
            self.patches += 0 if batch.layout is None else batch.layout.patches


def memory_gb(device: torch.device) -> float:
    """Return the memory in use: on CUDA the largest allocation so far, else what this process holds, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resident_bytes() / 1e9


def peak_flops(device: torch.device, *, bf16: bool, again: bool = False) -> float:
    """Return the device's largest matrix speed in FLOP/s: as published for known GPUs in bf16, else measured.

    again: measure once more (see `measured_peak`).
    """
    if device.type == "cuda" and bf16:
        published = flops.published_peak(torch.cuda.get_device_name(device))
        if published is not None:
            return published
    return measured_peak(device, torch.bfloat16 if bf16 else torch.float32, torch.get_num_threads(), again=again)
