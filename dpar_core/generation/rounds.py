"""The static decoder with images at tokens of their own: who begins a patch waits, and the patch transformer steps for many.

In lockstep (static.py) some image begins a patch at nearly every token, so the patch transformer is launched at every
token. Here a round is one launch of the patch transformer for all that wait for it, then some tokens of all that do not.
An image without a token left makes room for the next one. Two tokens per round are the best by a model of the launches
(docs/gpu.md): an image of 256 tokens in 142 patches takes about 175 rounds.

An image that waits is computed along and changes nothing: its decoder writes where its next token will write, its encoder
and its gate repeat its last token. Tokens do not wait for the gate's word on the one before them until they are sampled.

Shapes: B images at a time, N images asked for, T tokens per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dpar_core.generation.static import StaticDPAR, class_vectors

ROUND_TOKENS = 2  # tokens of an image between two launches of the patch transformer


class RoundsDPAR(StaticDPAR):
    """DPAR in rounds. One number of four bytes per round is read by the host: how many tokens are settled."""

    def parts(self) -> dict[tuple[Any, ...], Callable[[], None]]:
        return {("round",): partial(self.round, self.halves)}

    def round(self, halves: int) -> None:
        """Refill, close and open the patches that wait, and sample tokens of the images that can go on."""
        assert self.apart is not None
        self.ops.refill(self, self.apart)
        self.send_count()
        self.patch(self.images, halves)
        for token in range(ROUND_TOKENS):
            logits = self.decode(halves)
            if token:
                self.wait_for_gate()
            self.ops.sample(self, logits, halves)
            self.ask_beside()
            self.encode()
        self.wait_for_gate()

    def run(
        self, labels: Tensor, seeds: Sequence[int], given: Tensor | None, progress: Callable[[int], None] | None
    ) -> None:
        """Sample all images into `tokens`, `starts` and `entropies`. labels: (N or fewer,) int64 on the host."""
        apart, images, wanted = self.apart, self.images, len(labels)
        assert apart is not None
        self.begin(seeds, given)
        self.restart()
        null = self.config.num_classes
        apart.labels.copy_(F.pad(labels.cpu(), (0, self.most + 1 - wanted), value=null))
        self.classes.copy_(class_vectors(self.stepper.classes, labels[:images], images, self.halves))
        apart.total.fill_(wanted)
        apart.taken.fill_(min(images, wanted))
        apart.finished.zero_()
        self.image.copy_(self.all_rows[:images].clamp_max(wanted))
        apart.done.copy_(self.image == wanted)
        self.begins.copy_(~apart.done)
        settled = 0
        while settled < wanted * self.length:
            self.launch("round")
            before, settled = settled, self.read_count()
            if progress and settled > before:
                progress(settled - before)
