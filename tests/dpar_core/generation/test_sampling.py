"""How tokens are sampled: guidance over an image, and one number per token."""

import math

import pytest
import torch

from dpar_core.generation.sampling import SampleSettings, guide, sample_tokens, uniforms


def test_schedules_of_guidance():
    assert SampleSettings(cfg_scale=3.0).scales(4).tolist() == [3, 3, 3, 3]
    assert SampleSettings(cfg_scale=3.0, cfg_schedule="linear").scales(5).tolist() == [1, 1.5, 2, 2.5, 3]
    interval = SampleSettings(cfg_scale=3.0, cfg_schedule="interval", cfg_interval=(0.25, 0.75))
    assert interval.scales(8).tolist() == [1, 1, 3, 3, 3, 3, 1, 1]
    whole = SampleSettings(cfg_scale=3.0, cfg_schedule="interval", cfg_interval=(0.0, 1.0))
    assert whole.scales(6).tolist() == [3] * 6


def test_guidance_of_one_everywhere_needs_no_unconditional_half():
    assert not SampleSettings(cfg_scale=1.0).guided(16)
    assert not SampleSettings(cfg_scale=2.0, cfg_schedule="interval", cfg_interval=(0.5, 0.5)).guided(16)
    assert SampleSettings(cfg_scale=2.0, cfg_schedule="linear").guided(16)


def test_guided_logits_move_away_from_the_unconditional_ones():
    cond, uncond = torch.tensor([[1.0, 0.3]] * 2), torch.tensor([[0.5, 0.1]] * 2)
    guided = guide(cond, uncond, torch.tensor([1.0, 3.0]))
    assert torch.equal(guided[0], cond[0])
    torch.testing.assert_close(guided[1], torch.tensor([2.0, 0.7]))


def test_tokens_come_with_their_probabilities_and_never_with_none():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    count = 20_000
    sampled = sample_tokens(probabilities.log().expand(count, 6), uniforms(range(count), 1)[:, 0], SampleSettings())
    share = torch.bincount(sampled, minlength=6) / count
    assert (share[probabilities == 0] == 0).all()
    # four standard deviations of a share of one half
    torch.testing.assert_close(share, probabilities, atol=4 * math.sqrt(0.25 / count), rtol=0)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_exist(number):
    for seed in range(200):
        logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)) * 5
        logits[:, [0, -1]] = float("-inf")
        token = sample_tokens(logits, torch.tensor([number], dtype=torch.float64), SampleSettings()).item()
        assert 0 < token < 999


def test_greedy_takes_the_likeliest_and_filters_cut_the_rest():
    logits = torch.tensor([[0.0, 2.0, 1.9, -5.0]]).expand(500, 4)
    numbers = uniforms(range(500), 1)[:, 0]
    assert set(sample_tokens(logits, numbers, SampleSettings(greedy=True)).tolist()) == {1}
    assert set(sample_tokens(logits, numbers, SampleSettings(top_k=2)).tolist()) == {1, 2}
    assert set(sample_tokens(logits, numbers, SampleSettings(top_p=0.4)).tolist()) == {1}
    assert set(sample_tokens(logits, numbers, SampleSettings(temperature=0.01)).tolist()) == {1}


def sampled_by_hand(logits, number, settings):
    """Temperature, top-k with its ties, top-p with the token that crosses it, then the sum of probabilities, in order."""
    logits = [float(one) for one in logits / settings.temperature]
    kept = list(range(len(logits)))
    if settings.top_k:
        least = sorted(logits, reverse=True)[min(settings.top_k, len(logits)) - 1]
        kept = [index for index in kept if logits[index] >= least]

    def probabilities():
        largest = max(logits[index] for index in kept)
        weights = [math.exp(logits[index] - largest) for index in kept]
        return {index: weight / math.fsum(weights) for index, weight in zip(kept, weights)}

    if settings.top_p < 1:
        found, likelier = probabilities(), 0.0
        ordered, kept = sorted(kept, key=lambda index: -logits[index]), []
        for index in ordered:
            if likelier > settings.top_p:
                break
            kept.append(index)
            likelier += found[index]
    total = 0.0
    for index, share in sorted(probabilities().items()):
        total += share
        if total > number:
            return index
    raise AssertionError("probabilities add up to one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.5}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 2.0, "top_k": 9, "top_p": 0.8}],
)
def test_tokens_are_those_sampled_by_hand_with_ties_and_far_logits_too(filters, dtype):
    settings, generator = SampleSettings(**filters), torch.Generator().manual_seed(0)
    for spread in (0.3, 3.0, 20.0):
        logits = spread * torch.randn(24, 33, generator=generator)
        logits[8:16] = logits[8:16].round()  # many ties
        logits[16:, 7] = logits[16:, 20] = logits[16:].amax(1)  # two likeliest
        logits = logits.to(dtype).float()
        numbers = 0.001 + 0.998 * torch.rand(24, generator=generator, dtype=torch.float64)
        expected = [sampled_by_hand(row, number, settings) for row, number in zip(logits, numbers.tolist())]
        assert sample_tokens(logits, numbers, settings).tolist() == expected


def test_numbers_of_an_image_follow_from_its_seed_alone():
    together = uniforms([4, 9, 4], 64)
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1:2], uniforms([9], 64))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(cfg_scale=0.9), "cfg_scale must be at least 1"),
        (dict(cfg_scale=float("nan")), "cfg_scale must be at least 1"),
        (dict(cfg_schedule="cosine"), "constant, linear or interval"),
        (dict(cfg_interval=(0.8, 0.2)), "two shares"),
        (dict(gate="encoder"), "entropy_model or decoder"),
        (dict(temperature=0.0), "temperature >= 0.0001"),
        (dict(temperature=1e-40), "temperature >= 0.0001"),
        (dict(cfg_scale=1e38), "at most 10000"),
        (dict(top_p=0.0), "0 < top_p <= 1"),
    ],
)
def test_senseless_settings_are_refused_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleSettings(**change)
