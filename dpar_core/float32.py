"""Where float32 has to stay float32: results that other machines' results are compared with."""

from __future__ import annotations

import threading

import torch


class WholeFloat32:
    """Keep float32 products whole while any thread is inside: no TF32, which cuDNN uses for convolutions by default.

    TF32 keeps 10 bits of a product's mantissa. Tokens, and the features that scores are made of, would then depend on
    the kind of GPU. The settings belong to the process: of threads that enter and leave, the first one sets them and the
    last one restores them. May be entered again by a thread that is inside.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before = ("highest", False)

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                torch.set_float32_matmul_precision("highest")
                torch.backends.cudnn.allow_tf32 = False
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.set_float32_matmul_precision(self.before[0])
                torch.backends.cudnn.allow_tf32 = self.before[1]


whole_float32 = WholeFloat32()
