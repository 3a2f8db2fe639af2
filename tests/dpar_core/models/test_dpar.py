"""The packed, ragged forward pass against the method's text, one image, one patch and one position at a time."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from dpar_core.models import dpar as dpar_module
from dpar_core.models.dpar import DPAR, LONGEST_GATHERED, DPARConfig, Slots, _complete, _Gathered, _Segments, spread
from dpar_core.patches.layout import PatchLayout
from dpar_core.training import parallel

GRID, CODES, WIDTH, HEADS = 4, 12, 32, 2
HEAD = WIDTH // HEADS
SHORT = [[1, 1, 2, 4, 1, 3, 4], [1, 7, 8], [1] * 16]
LONG = [[1, 2, 10, 3], [16], [1, 3, 4, 4, 4]]


def model_of(encoding="4d", split=(2, 2, 2)):
    torch.manual_seed(0)
    model = DPAR(DPARConfig(CODES, GRID, WIDTH, HEADS, *split, 3, ffn_multiple=32, position_encoding=encoding))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + float("norm" in name))
    return model.train()  # dropout is 0


def batch_of(lengths):
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(CODES, (len(lengths), GRID**2), generator=random)
    layout = PatchLayout.from_lengths([np.array(one) for one in lengths], row_width=GRID)
    return tokens, torch.arange(len(lengths)) % 4, layout  # 3 is the null class


def rms(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def frequency(i, n):
    return 10000.0 ** (-i / n)


def token_angles(t):
    return [place * frequency(i, HEAD // 4) for place in (t // GRID, t % GRID) for i in range(HEAD // 4)]


def patch_angles(k, first, length, encoding):
    if encoding == "1d":
        return [k * frequency(i, HEAD // 2) for i in range(HEAD // 2)]
    row, c0, c1 = first // GRID, first % GRID, (first + length - 1) % GRID
    columns = {"3d": [c0, c1], "4d": [c0, c1, c1, c0]}[encoding]
    n = HEAD // 4 // len(columns)
    by_row = [row * frequency(i, HEAD // 4) for i in range(HEAD // 4)]
    return by_row + [column * frequency(i, n) for column in columns for i in range(n)]


def turned(x, angles):
    """Turn one head's adjacent pairs; a position without angles (class, start) has cos = sin = 0."""
    if angles is None:
        return x * 0
    cos, sin, even, odd = torch.tensor(angles).cos(), torch.tensor(angles).sin(), x[0::2], x[1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=1).flatten()


def softmax_sum(q, keys, values):
    weights = (torch.stack(keys) @ q / HEAD**0.5).softmax(0)
    return weights @ torch.stack(values)


def heads(x):
    return [x[h * HEAD : (h + 1) * HEAD] for h in range(HEADS)]


def block(w, xs, angles):
    """w: weights by name. xs: list of (D,), each with its angles."""
    projected = [(w["attention.wqkv.weight"] @ rms(x, w["attention_norm.weight"])).split(WIDTH) for x in xs]
    q, k = ([[turned(h, a) for h in heads(p[i])] for p, a in zip(projected, angles)] for i in (0, 1))
    v = [heads(p[2]) for p in projected]
    out = []
    for i, x in enumerate(xs):
        seen = range(i + 1)
        read = [softmax_sum(q[i][h], [k[j][h] for j in seen], [v[j][h] for j in seen]) for h in range(HEADS)]
        x = x + w["attention.wo.weight"] @ torch.cat(read)
        y = rms(x, w["ffn_norm.weight"])
        gated = F.silu(w["feed_forward.w1.weight"] @ y) * (w["feed_forward.w3.weight"] @ y)
        out.append(x + w["feed_forward.w2.weight"] @ gated)
    return out


def slow_logits(model, tokens, label, lengths, encoding):
    """Logits (T, V) of one image, by the method's section 4."""
    weights = dict(model.named_parameters())

    def under(prefix):
        return {name.removeprefix(prefix + "."): p for name, p in weights.items() if name.startswith(prefix + ".")}

    split = model.config
    firsts = [sum(lengths[:k]) for k in range(len(lengths))]
    own = [range(first, first + n) for first, n in zip(firsts, lengths)][:-1]  # the last patch is never needed
    x = [weights["tok_embeddings.weight"][t] for t in tokens[:-1]]
    patches = None
    for i in range(split.encoder_layers):
        x = block(under(f"local_encoder.layers.{i}"), x, [token_angles(t) for t in range(len(x))])
        patches = patches or [torch.stack([x[t] for t in mine]).amax(0) for mine in own]
        w = under(f"local_encoder.cross_attn_layers.{i}")
        for p, mine in enumerate(own):
            normed = [rms(x[t], w["cross_attn_norm_kv.weight"]) for t in mine]
            q = heads(w["wq.weight"] @ rms(patches[p], w["cross_attn_norm_q.weight"]))
            k, v = ([heads(w[name] @ y) for y in normed] for name in ("wk.weight", "wv.weight"))
            read = [softmax_sum(q[h], [one[h] for one in k], [one[h] for one in v]) for h in range(HEADS)]
            patches[p] = patches[p] + w["wo.weight"] @ torch.cat(read)
    h = [weights["cls_embedding.embedding_table.weight"][label], *patches]
    places = [None] + [patch_angles(k, firsts[k], lengths[k], encoding) for k in range(len(patches))]
    for i in range(split.patch_layers):
        h = block(under(f"layers.{i}"), h, places)
    y = [weights["decoder_start_embedding.weight"][0], *x]
    holder = [k for k, n in enumerate(lengths) for _ in range(n)]
    for i in range(split.decoder_layers):
        w = under(f"local_decoder.cross_attn_layers.{i}")
        y = [one + w["wo.weight"] @ rms(h[k], w["cross_attn_norm_kv.weight"]) for one, k in zip(y, holder)]
        y = block(under(f"local_decoder.layers.{i}"), y, [None] + [token_angles(t) for t in range(len(y) - 1)])
    return torch.stack([weights["output.weight"] @ rms(one, weights["norm.weight"]) for one in y])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("encoding", "lengths"), [("4d", SHORT), ("1d", LONG), ("3d", SHORT)])
def test_the_packed_forward_pass_and_its_gradients_are_those_of_the_text(encoding, lengths):
    model = model_of(encoding, (2, 1, 2) if lengths is LONG else (1, 2, 1))
    tokens, labels, layout = batch_of(lengths)
    packed = model(tokens, labels, layout)
    slow = torch.stack([slow_logits(model, t, y, n, encoding) for t, y, n in zip(tokens.tolist(), labels.tolist(), lengths)])
    torch.testing.assert_close(packed, slow, atol=1e-5, rtol=1e-4)
    losses = [F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) for logits in (packed, slow)]
    fast, walked = (gradients(model, loss) for loss in losses)
    assert len(fast) == len(walked) and all(gradient.abs().max() > 1e-6 for gradient in walked.values())
    for name, gradient in walked.items():
        # float32 sums in another order: errors are of the largest entries' size, not of each entry's
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fast[name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_patches_pooled_as_segments_are_those_pooled_as_rows(lengths):
    model, layout = model_of(), batch_of(lengths)[2]
    assert (layout.longest > LONGEST_GATHERED) == (lengths is LONG)
    attention, complete = model.local_encoder.cross_attn_layers[0], len(_complete(layout))
    found = []
    for kind in (_Gathered, _Segments):
        x = torch.randn(len(lengths), GRID**2 - 1, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        pool = kind(layout, GRID**2 - 1)
        refined = pool.refine(attention, pool.maximum(x), x)[:complete]
        found.append([refined.detach(), torch.autograd.grad(refined.square().sum(), x)[0]])
    for rows, segments in zip(*found):
        torch.testing.assert_close(rows, segments, atol=1e-5, rtol=1e-5)


def test_copies_of_patches_are_those_of_an_embedding_and_summed_without_sorting():
    layout = batch_of(SHORT)[2]
    slots = Slots.of(layout, torch.arange(layout.patches))
    states = torch.randn(layout.patches + 2, WIDTH, generator=torch.Generator().manual_seed(2))  # two rows are spare
    found = []
    for copy in (lambda h: F.embedding(layout.patch_ids, h), lambda h: spread(h, layout.patch_ids, slots)):
        h = states.clone().requires_grad_()
        copied = copy(h)
        found.append([copied.detach(), torch.autograd.grad((copied * copied.detach().cos()).sum(), h)[0]])
    for theirs, mine in zip(*found):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tokens", [GRID**2, GRID**2 - 1])
def test_gradients_of_gathered_tokens_are_those_of_an_embedding(tokens):
    layout = batch_of(SHORT)[2]
    pool = _Gathered(layout, tokens)
    x = torch.randn(len(SHORT), tokens, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mask = pool.mask.unsqueeze(-1)  # slots that are left over have no gradient, nor have those of spare rows
    mask[len(_complete(layout)) :] = False
    mine, theirs = (
        torch.autograd.grad((rows.masked_fill(~mask, 0) * rows.detach().cos()).sum(), x)[0]
        for rows in (pool._gather(x), F.embedding(pool.token, x.flatten(0, 1)))
    )
    assert torch.equal(mine, theirs) and mine.count_nonzero() == layout.complete_tokens * WIDTH


@pytest.mark.no_cover  # torch's own Python, of which tracing only costs time
def test_compiled_blocks_are_few_graphs_for_all_ragged_batches_and_give_what_plain_blocks_give(monkeypatch):
    # as on other devices than a CPU
    monkeypatch.setattr(dpar_module, "copy_slots", lambda layout: Slots.of(layout, torch.arange(layout.patches)))
    model = model_of(split=(1, 1, 1))
    random = np.random.default_rng(3)
    batches = []
    for chance in (0.6, 0.9, 0.4, 0.1):
        cuts = [np.flatnonzero(np.r_[True, random.random(15) < chance, True]) for _ in range(4)]
        batches.append(batch_of([np.diff(cut).tolist() for cut in cuts]))
    assert len({layout.patches for _, _, layout in batches}) == len(batches)
    plain = [gradients(model, model(*batch).square().sum()) for batch in batches]
    plain = [{name: gradient.clone() for name, gradient in one.items()} for one in plain]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    # fullgraph: a graph break is an error
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True))
    parallel.compile_blocks(model, backend=counter)
    for batch, expected in zip(batches, plain):
        for name, gradient in gradients(model, model(*batch).square().sum()).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
    # T - 1 rows of the encoder, T of the decoder, packed rows, and packed rows of which none is spare; pooling and copying
    assert counter.frame_count <= 6
