"""Where the time of sampling goes: the networks of a generator timed part by part, as they are called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpar_core.generation.generate import DPARGenerator, GPTGenerator


@contextmanager
def timed_parts(generator: DPARGenerator | GPTGenerator) -> Iterator[dict[str, float]]:
    """Time the parts of a generator while the block runs; yields part -> seconds, which fills up.

    DPAR: entropy model, patch encoder, patch transformer, patch decoder, output layer; the baseline: transformer, output
    layer. What else sampling does is in none of them. Stays empty where parts run as one captured graph (the static
    decoder of GPUs), as nothing can be timed inside it.
    """
    spent: dict[str, float] = {}
    if generator.static:
        yield spent
        return
    stepper: Any = generator.stepper
    owner: Any = generator
    lists = {"blocks": "transformer"}
    if isinstance(generator, DPARGenerator):
        lists = {"encoder": "patch encoder", "readers": "patch encoder", "patch_blocks": "patch transformer"}
        lists["decoder"] = "patch decoder"
    before = {name: getattr(stepper, name) for name in (*lists, "head")}
    gate = getattr(generator, "gate", None)
    spent |= {part: 0.0 for part in ([] if gate is None else ["entropy model"])}
    spent |= {part: 0.0 for part in (*lists.values(), "output layer")}
    try:
        for name, part in lists.items():
            setattr(stepper, name, [_Timed(one, part, spent) for one in before[name]])
        stepper.head = _Timed(before["head"], "output layer", spent)
        if gate is not None:
            owner.gate = _Timed(gate, "entropy model", spent)
        yield spent
    finally:
        for name, value in before.items():
            setattr(stepper, name, value)
        if gate is not None:
            owner.gate = gate


class _Timed:
    """Stands for a network: its calls, and those of its methods, are timed."""

    def __init__(self, network: Any, part: str, spent: dict[str, float]) -> None:
        self._network, self._part, self._spent = network, part, spent

    def __call__(self, *args: Any) -> Any:
        return self._timed(self._network)(*args)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._network, name)
        return self._timed(value) if callable(value) else value

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self._spent[self._part] += time.perf_counter() - started

        return call
