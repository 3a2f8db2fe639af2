"""The forms attention takes agree with each other and with one image at a time."""

import pytest
import torch

import dpar_core.models.layers as layers
from dpar_core.models.layers import PackedCausal, causal, causal_attention, plain_causal_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_way_gives_what_the_fused_kernel_gives_with_its_gradients(dtype):
    torch.manual_seed(0)
    q, k, v, out = (torch.randn(2, 3, 17, 8, dtype=dtype) for _ in range(4))
    results = []
    for attend in (plain_causal_attention, lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found = attend(*leaves)
        found.backward(out)
        results.append([found.detach(), *(leaf.grad for leaf in leaves)])
    # bfloat16 keeps 8 bits, and the two ways round in different places.
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for plain, fused in zip(*results):
        torch.testing.assert_close(plain, fused, atol=tolerance, rtol=tolerance)


def test_short_bfloat16_sequences_on_a_cpu_take_the_plain_way_only_where_gradients_are_needed():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.bfloat16) for _ in range(3))
    assert torch.equal(causal_attention(q, k, v), plain_causal_attention(q, k, v))
    with torch.no_grad():
        fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.equal(causal_attention(q, k, v), fused)


def test_packed_images_attend_as_each_would_alone():
    torch.manual_seed(0)
    counts = [3, 1, 7, 5]
    offsets = torch.tensor([0, 3, 4, 11, 16])
    q, k, v = (torch.randn(16, 2, 8) for _ in range(3))
    packed = PackedCausal(offsets, rows=16, longest=7)(q, k, v)
    for first, count in zip(offsets.tolist(), counts):
        part = slice(first, first + count)
        alone = causal(q[None, part], k[None, part], v[None, part])[0]
        torch.testing.assert_close(packed[part], alone, atol=1e-6, rtol=1e-6)


def one_image_at_a_time(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What torch documents of varlen_attn, the slow way; it has no CPU kernel."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
    assert max_q == max_k == cu_seq_q.diff().max()
    parts = [slice(a, b) for a, b in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:])]
    return torch.cat([causal(q[None, part], k[None, part], v[None, part])[0] for part in parts])


def ragged_problem(device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    offsets = torch.tensor([0, 3, 4, 11, 16], device=device)
    tensors = [torch.randn(16, 2, 8, device=device, dtype=dtype) for _ in range(4)]
    return PackedCausal(offsets, rows=16, longest=7), tensors


def with_gradients(attend, tensors):
    *leaves, out = [x.clone().requires_grad_() for x in tensors]
    found = attend(*leaves)
    found.backward(out)
    return [found.detach(), *(leaf.grad for leaf in leaves)]


def test_ragged_attention_is_asked_for_what_padded_attention_gives():
    packed, tensors = ragged_problem()
    packed.kernel = one_image_at_a_time
    for ragged, padded in zip(with_gradients(packed.ragged, tensors), with_gradients(packed.padded, tensors)):
        torch.testing.assert_close(ragged, padded, atol=1e-6, rtol=1e-6)


def test_images_that_attend_alone_get_what_padded_attention_gives():
    packed, tensors = ragged_problem()
    for spare in (0, 3):  # rows past the packed ones hold nothing
        given = [torch.cat([x, x.new_zeros(spare, 2, 8)]) for x in tensors]
        for alone, padded in zip(with_gradients(packed.alone, given), with_gradients(packed.padded, given)):
            torch.testing.assert_close(alone, padded, atol=1e-6, rtol=1e-6)


def test_only_large_images_attend_alone():
    small, _ = ragged_problem()
    assert not small.pays_alone(torch.empty(16, 2, 8))
    large = PackedCausal(torch.tensor([0, 100, 351]), rows=351, longest=251)  # two images at size B
    assert large.pays_alone(torch.empty(351, 12, 64))
    assert not large.pays_alone(torch.empty(351, 12, 64, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is CUDA's")
def test_ragged_attention_on_a_gpu_gives_what_padded_attention_gives():
    packed, tensors = ragged_problem("cuda", torch.bfloat16)
    assert layers.has_ragged_attention(tensors[0])
    for ragged, padded in zip(with_gradients(packed.ragged, tensors), with_gradients(packed.padded, tensors)):
        torch.testing.assert_close(ragged, padded, atol=0.06, rtol=0.06)


def test_spare_rows_take_no_part_in_attention():
    packed, (q, k, v, _) = ragged_problem()
    spare = [torch.cat([x, torch.full((5, *x.shape[1:]), 1e9)]) for x in (q, k, v)]
    found = packed.padded(*spare)
    torch.testing.assert_close(found[:16], packed.padded(q, k, v), atol=0, rtol=0)
    assert found.shape == spare[0].shape and not found[16:].any()


def test_labels_become_the_null_class_as_often_as_they_should_and_in_training_alone():
    torch.manual_seed(0)
    embedder, count = layers.LabelEmbedder(3, 4, class_dropout=0.1), 20_000
    labels = torch.arange(count) % 3
    rows = embedder.train()(labels)
    null = (rows == embedder.embedding_table.weight[embedder.null_label]).all(1)
    assert embedder.null_label == 3
    assert null.double().mean() == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / count) ** 0.5)  # four standard deviations
    assert torch.equal(rows[~null], embedder.embedding_table(labels[~null]))
    assert torch.equal(embedder.eval()(labels), embedder.embedding_table(labels))
