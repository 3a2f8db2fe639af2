"""The loss of the output layer, a block of logits at a time."""

import pytest
import torch
import torch.nn.functional as F

import dpar_core.models.loss as loss_module
from dpar_core.models.loss import output_loss


def problem(images: int = 3, tokens: int = 5, width: int = 8, codes: int = 16):
    torch.manual_seed(0)
    x = torch.randn(images, tokens, width, requires_grad=True)
    weight = torch.randn(codes, width, requires_grad=True)
    return x, weight, torch.randint(codes, (images, tokens))


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), targets.flatten())


def gradients(loss, x, weight):
    return torch.autograd.grad(loss * 0.5, (x, weight))


def test_a_small_batch_has_the_bits_of_cross_entropy():
    x, weight, targets = problem()
    assert torch.equal(output_loss(x, weight, targets), plain(x, weight, targets))


@pytest.mark.parametrize("rows", [1, 4, 5, 14])
def test_blocks_give_the_loss_and_gradients_of_all_logits_at_once(monkeypatch, rows):
    x, weight, targets = problem()
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", rows * len(weight))
    found, expected = output_loss(x, weight, targets), plain(x, weight, targets)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for mine, theirs in zip(gradients(found, x, weight), gradients(expected, x, weight)):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_blocks_under_autocast_round_as_all_logits_do(monkeypatch):
    x, weight, targets = problem(width=64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x, weight, targets)
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 4 * len(weight))
        found = output_loss(x, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # the same bfloat16 products
    for mine, theirs in zip(gradients(found, x, weight), gradients(expected, x, weight)):
        assert mine.dtype == torch.float32
        # bfloat16 keeps 8 bits; the weight's gradient is rounded once per block instead of once
        torch.testing.assert_close(mine, theirs, atol=1e-2 * float(theirs.abs().max()), rtol=0)


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    x, weight, targets = problem()
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 2 * len(weight))
    with torch.no_grad():
        found = output_loss(x, weight, targets)
    torch.testing.assert_close(found, plain(x, weight, targets).detach(), atol=1e-6, rtol=1e-6)


def test_a_block_of_logits_is_all_that_is_held(monkeypatch):
    """Counted where tensors are made: none of N x V is ever there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    x, weight, targets = problem(images=8, tokens=16)
    sizes = []
    for rows in (4, 1000):
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", rows * len(weight))
        with Largest() as largest:
            gradients(output_loss(x, weight, targets), x, weight)
        sizes.append(largest.elements)
    assert sizes == [x.numel(), targets.numel() * len(weight)]
