"""LlamaGen's GPT: DPAR's class-conditional baseline, and without class token the entropy model.

Shapes: B images, T tokens per image (G x G raster), n tokens given, V codebook entries, D width, H heads, L layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.choices import GatePrecision
from dpar_core.models.configs import GPTConfig as GPTConfig
from dpar_core.models.layers import Block, LabelEmbedder, RMSNorm, Stack, initialize
from dpar_core.models.loss import output_loss
from dpar_core.models.rope import Rotary, token_rotary
from dpar_core.precision import dtype_of


class GPT(nn.Module):
    """Decoder-only transformer over image tokens in raster order (LlamaGen, Sec. 3)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if config.num_classes is not None:
            self.cls_embedding = LabelEmbedder(config.num_classes, config.width, class_dropout=config.class_dropout)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.layers = Stack[Block](
            Block(config.width, config.heads, config.hidden, dropout=config.dropout) for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        leading = 0 if config.num_classes is None else 1
        table = token_rotary(config.row_width, config.width // config.heads, leading=leading)
        self.register_buffer("rotary_cos", table.cos, persistent=False)
        self.register_buffer("rotary_sin", table.sin, persistent=False)
        initialize(self, output=self.output)

    rotary_cos: Tensor
    rotary_sin: Tensor

    @property
    def rotary(self) -> Rotary:
        """The table of all positions: ((1 +) T, hd / 2)."""
        return Rotary(self.rotary_cos, self.rotary_sin)

    def embed(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """Return the input of the first layer: (B, (1 +) n, D)."""
        x: Tensor = self.tok_embeddings(tokens)
        if self.config.num_classes is None:
            if labels is not None:
                raise ValueError("this GPT has no class token (num_classes is None), but labels were given")
            return x
        if labels is None:
            raise ValueError(f"this GPT is conditioned on {self.config.num_classes} classes, but no labels were given")
        return torch.cat([self.cls_embedding(labels)[:, None], x], dim=1)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, *, targets: Tensor | None = None) -> Tensor:
        """Predict the next token at every position.

        tokens: (B, n) int64, n <= T.
        labels: (B,) int64, or None without class token.
        Returns logits (B, n + 1, V) where position i predicts token i, or without class token (B, n, V) where position i
        predicts token i + 1; with targets, int64 (B, n + 1) or (B, n), their mean cross-entropy instead: () float32.
        Raises ValueError when labels and class token do not go together.
        """
        x = F.dropout(self.embed(tokens, labels), self.config.dropout, self.training)
        table = self.rotary.at(slice(x.shape[1]))
        for layer in self.layers:
            x = layer(x, table)
        x = self.norm(x)
        return self.output(x) if targets is None else output_loss(x, self.output.weight, targets)


def next_token_entropies(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) over the last dimension: (...,) float32 nats, from float32 logits."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.inference_mode()
def entropies_of(model: GPT, tokens: Tensor, precision: GatePrecision = "fp32") -> Tensor:
    """Return e_t = H(x_t | x_<t) of every token under an entropy model.

    tokens: (B, T) int64.
    precision: of the products, under autocast; softmax and entropy are float32 in each of them.
    Returns (B, T) float32 nats; entry 0 is nan, as nothing predicts the first token.
    """
    with torch.autocast(tokens.device.type, dtype_of(precision), enabled=precision != "fp32"):
        logits = model(tokens[:, :-1])
    entropies = next_token_entropies(logits)
    return F.pad(entropies, (1, 0), value=float("nan"))


def next_token_loss(model: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return a GPT's mean cross-entropy in nats per token: over T tokens, or T - 1 without class token: () float32."""
    loss: Tensor = model(tokens[:, :-1], labels, targets=tokens if labels is not None else tokens[:, 1:])
    return loss
