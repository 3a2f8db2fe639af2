"""Attention over caches whose rows stand at places of their own, and matrices whose rows do not know each other."""

import pytest
import torch
import torch.nn.functional as F

from dpar_core.generation.kv_cache import KVCache, capacity
from dpar_core.generation.stepping import Matrix, can_pack
from dpar_core.models.memory import cache_bytes

ROWS, HEADS, HEAD_DIM, LIMIT = 5, 2, 8, 70
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def filled(lengths: list[int], *, in_place: bool = True, rows: int = ROWS) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """A cache of one layer in which row r holds lengths[r] positions, and all keys and values (rows, LIMIT, H, hd)."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, rows, LIMIT, HEADS, HEAD_DIM, generator=generator)
    cache = KVCache(layers=1, rows=rows, heads=HEADS, head_dim=HEAD_DIM, limit=LIMIT, device=CPU, dtype=torch.float32)
    cache.in_place = in_place
    for position in range(max(lengths)):
        who = torch.tensor([row for row, length in enumerate(lengths) if length > position])
        step = cache.plan(who, torch.full_like(who, position))
        cache.write(0, step, k[who, position], v[who, position])
    return cache, k, v


@pytest.mark.parametrize("in_place", [True, False], ids=["table rows", "selected rows"])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1, 1], [40, 3, 70, 33, 17], [64, 64, 64, 64, 64]])
def test_a_row_attends_to_its_own_positions_alone(lengths, in_place):
    cache, k, v = filled(lengths, in_place=in_place)
    who = torch.tensor([3, 0, 2])
    step = cache.plan(who, torch.tensor([lengths[row] - 1 for row in who]))
    q = torch.randn(3, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    found = cache.attend(0, step, q)
    for out, query, row in zip(found, q, who.tolist()):
        keys, values = (x[row, : lengths[row]].transpose(0, 1) for x in (k, v))
        expected = F.scaled_dot_product_attention(query.unsqueeze(1), keys, values, scale=1.0).squeeze(1)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_neither_other_rows_nor_the_room_in_the_cache_change_a_bit():
    q = torch.randn(1, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    who, at = torch.tensor([0]), torch.tensor([20])
    results = []
    for lengths in ([21, 0, 0, 0, 0], [21, 70, 70, 1, 33], [21, 40, 2, 2, 2]):
        cache, _, _ = filled(lengths)
        alone = cache.attend(0, cache.plan(who, at), q)
        others = [row for row in range(1, ROWS) if lengths[row]]
        together = cache.plan(torch.tensor([*others, 0]), torch.tensor([*(lengths[row] - 1 for row in others), 20]))
        among = cache.attend(0, together, torch.cat([torch.ones(len(others), HEADS, HEAD_DIM), q]))[-1:]
        results += [alone, among]
    assert all(torch.equal(result, results[0]) for result in results)


def test_capacity_grows_in_steps_up_to_the_limit():
    assert [capacity(n, 70) for n in (1, 32, 33, 64, 65, 70)] == [32, 32, 64, 64, 80, 80]
    assert capacity(1, 4) == 16
    cache, _, _ = filled([70, 1, 1, 1, 1])
    assert cache.nbytes == cache_bytes(layers=1, rows=ROWS, width=HEADS * HEAD_DIM, positions=LIMIT, value_bytes=4)


def test_a_position_beyond_the_limit_is_refused():
    cache, _, _ = filled([1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="beyond the cache's limit of 80 positions"):
        cache.plan(torch.tensor([0]), torch.tensor([80]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (96, 32), (200, 64), (768, 768), (1280, 4096)])
def test_rows_of_a_product_do_not_know_how_many_there_are(inputs, outputs, packed, dtype):
    if packed and not can_pack(CPU):
        pytest.skip("this build of torch has no packed matrices")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(outputs, inputs, generator=generator), torch.randn(65, inputs, generator=generator)
    matrix = Matrix(weight, dtype, packed=packed)
    whole = matrix(x)
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(whole, x @ weight.T, atol=1e-1 * inputs**0.5 if rough else 1e-3, rtol=0)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        whole = whole if packed else matrix(x)  # the plain BLAS may also split a sum over its threads
        for rows in (1, 2, 3, 5, 16, 17, 31, 64):
            assert torch.equal(matrix(x[:rows]), whole[:rows])
            assert torch.equal(matrix(x[65 - rows :]), whole[65 - rows :])
