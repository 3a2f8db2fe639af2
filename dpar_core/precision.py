"""Which precision a device multiplies matrices in, and which it only emulates.

A CPU without bfloat16 instructions (AVX2 alone: EPYC Zen 3 and older, most laptops) converts every operand, and a training
step takes many times as long as in float32. `auto` avoids that: bf16 where the device multiplies it, else fp32.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch is imported where it is asked, so that checking a params file does not wait for it
    import torch

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]

# Levels of oneDNN's ONEDNN_MAX_CPU_ISA that hide a CPU's bfloat16 products, and of ATEN_CPU_CAPABILITY.
_ISAS_WITHOUT = frozenset(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"))
_CAPABILITIES_WITHOUT = frozenset(("default", "avx2"))


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether a device has bfloat16 matrix products of its own.

    On a CPU that means AVX512-BF16, AMX or Arm's BF16, as torch reports them, unless ONEDNN_MAX_CPU_ISA or
    ATEN_CPU_CAPABILITY hide them. The answer is a function of the hardware and the environment; nothing is timed.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return not _hidden(os.environ) and _cpu_reports_bf16()


def _hidden(environment: Mapping[str, str]) -> bool:
    isa = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    return isa.upper() in _ISAS_WITHOUT or environment.get("ATEN_CPU_CAPABILITY", "").lower() in _CAPABILITIES_WITHOUT


def _cpu_reports_bf16() -> bool:
    import torch

    amx_or_avx512 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public names for these
    if any(getattr(torch.cpu, name, lambda: False)() for name in amx_or_avx512):
        return True
    # On x86 oneDNN also answers yes where it only converts (AVX-512 without BF16); on Arm this is the only question.
    arm = os.uname().machine in ("aarch64", "arm64") if hasattr(os, "uname") else False
    known = getattr(getattr(torch.ops, "mkldnn", None), "_is_mkldnn_bf16_supported", None)
    return bool(arm and known is not None and known())


def dtype_of(precision: str) -> torch.dtype:
    """Return what values are rounded to: fp32, fp16 or bf16."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def settle(choice: PrecisionChoice, device: torch.device | str) -> Precision:
    """Return the precision that a choice means on a device: auto is bf16 where `multiplies_bf16`, else fp32."""
    if choice != "auto":
        return choice
    return "bf16" if multiplies_bf16(device) else "fp32"


def slowdown(device: torch.device | str) -> float:
    """Return how many times as long a matrix product takes in bfloat16 as in float32; measured in some milliseconds."""
    import torch

    return product_seconds(device, torch.bfloat16, size=256) / product_seconds(device, torch.float32, size=256)


def product_seconds(device: torch.device | str, dtype: torch.dtype, *, size: int, budget_s: float = 0.1) -> float:
    """Return the shortest time of a product of two (size, size) matrices in seconds, among at most 16 within the budget.

    The first product, which loads kernels, counts only when it alone exceeds the budget.
    """
    import torch

    matrix = torch.ones(size, size, device=device, dtype=dtype)
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < 17 and (not times or time.perf_counter() - began < budget_s):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:] or times)


_PEAKS: dict[tuple[torch.device, torch.dtype, int], float] = {}


def measured_peak(device: torch.device, dtype: torch.dtype, threads: int, *, again: bool = False) -> float:
    """Return the largest matrix speed of a device in FLOP/s that this process has measured, in well under a second.

    threads: of torch.
    again: measure once more. Whatever else the machine does makes a measured speed too small, so the largest one counts.
    bfloat16 that a device emulates is measured in float32 instead: nobody waits for a number that would describe the
    emulation.
    """
    key = (device, dtype, threads)
    if again or key not in _PEAKS:
        _PEAKS[key] = max(_measure_peak(device, dtype), _PEAKS.get(key, 0.0))
    return _PEAKS[key]


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    import torch

    if dtype == torch.bfloat16 and not multiplies_bf16(device):
        dtype = torch.float32
    largest = 1024 if device.type == "cpu" else 8192
    size, best = 256, 0.0
    while True:
        seconds = product_seconds(device, dtype, size=size)
        best = max(best, 2 * size**3 / seconds)
        if size == largest or seconds * (largest / size) ** 3 > 0.2:
            return best
        size = largest
