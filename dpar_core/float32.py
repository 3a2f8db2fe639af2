"""Where float32 has to stay float32: results that other machines' results are compared with."""

from __future__ import annotations

import threading

import torch


class Float32Products:
    """Decide how float32 products are computed while any thread is inside: whole, or in TF32 where a GPU has it.

    TF32 keeps 10 bits of a product's mantissa; cuDNN uses it for convolutions by default. Tokens, and the features that
    scores are made of, would then depend on the kind of GPU. The settings belong to the process: of threads that enter and
    leave, the first one sets them and the last one restores them. May be entered again by a thread that is inside; only one
    of the two kinds may be in use at a time.
    """

    def __init__(self, *, tf32: bool) -> None:
        self.tf32 = tf32
        self.lock, self.inside = threading.Lock(), 0
        self.before = ("highest", False)

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
                torch.backends.cudnn.allow_tf32 = self.tf32
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.set_float32_matmul_precision(self.before[0])
                torch.backends.cudnn.allow_tf32 = self.before[1]


whole_float32 = Float32Products(tf32=False)
tensor_float32 = Float32Products(tf32=True)
