"""What training is expected to hold in memory, beside what a step keeps for its backward pass."""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dpar_core.models import layers
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.models.memory import training_memory
from dpar_core.patches.layout import PatchLayout

GRID, CODES, PATCHES = 8, 16, 32
TOKENS = GRID**2


def kept_bytes(config, images, *, bf16):
    """Bytes of all tensors that a forward pass keeps for the backward pass, weights apart."""
    model = (DPAR if isinstance(config, DPARConfig) else GPT)(config).train()
    tokens, labels = torch.zeros(images, TOKENS, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no other tensor takes its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if isinstance(config, DPARConfig):
            lengths = [np.full(PATCHES, TOKENS // PATCHES, np.uint16)] * images
            model(tokens, labels, PatchLayout.from_lengths(lengths, row_width=GRID), targets=tokens)
        else:
            next_token_loss(model, tokens, labels)
    return sum(storage.nbytes() for storage in kept.values())


def gpt(blocks):
    return GPTConfig(CODES, GRID, 64, 2, blocks, ffn_multiple=192, num_classes=3)


def dpar(blocks):
    return DPARConfig(CODES, GRID, 64, 2, 1, blocks, 1, 3, 192)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("config", "patches"), [(gpt, None), (dpar, PATCHES)])
def test_a_block_keeps_what_is_expected_of_it(config, patches, bf16, monkeypatch):
    monkeypatch.setattr(layers, "SHORT", 0)  # attention in one kernel, as on a GPU

    def of_a_block(count):  # what one more block keeps of one more image
        return (count(2, 2) - count(1, 2)) - (count(2, 1) - count(1, 1))

    kept = of_a_block(lambda blocks, images: kept_bytes(config(blocks), images, bf16=bf16))
    expected = of_a_block(lambda blocks, images: training_memory(config(blocks), patches, bf16=bf16).total(images))
    # Two bytes of 34 or 50 D are masks of dropout, absent here; padded rows of attention add some to DPAR's.
    assert 0.96 * expected < kept < 1.06 * expected


def test_a_run_expects_weights_gradients_moments_and_the_logits_of_its_loss():
    config = gpt(2)
    count = sum(parameter.numel() for parameter in GPT(config).parameters())
    fp32, bf16, shard = (
        training_memory(config, None, bf16=half, shards=shards) for half, shards in ((False, 1), (True, 1), (True, 4))
    )
    assert fp32.state == 16 * count and bf16.state == 18 * count and shard.state == 6 * count
