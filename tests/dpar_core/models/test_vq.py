"""The VQ tokenizer against the published code's outputs and against its rules walked in plain Python."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dpar_core.models import vq as tokenizer
from dpar_core.models.published import read_vq
from dpar_core.models.vq import UNUSED_BUFFER, VQ, Quantizer, VQConfig, config_of, encode_at, most_images, to_float, to_uint8
from tests.helpers.paths import GOLDEN

GOLDEN_CONFIG = VQConfig(64, 8, 32, (2, 1), 32, 2)
TINY = VQConfig(16, 4, 8, (1, 2), 8, 1, norm_groups=4)


@pytest.fixture(scope="module")
def golden():
    state = load_file(GOLDEN / "llamagen_vq.safetensors")
    model = VQ(config_of(state)).eval()
    model.load_state_dict(state)
    arrays = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "llamagen_vq.npz").items()}
    return model, arrays


def close(found, expected, tolerance=1e-4):
    # 1e-4: two paths of the published code differ by 6e-6 (golden/README.md); ours measured 7e-6.
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@torch.inference_mode()
def test_latents_codes_and_reconstruction_are_those_of_the_published_code(golden):
    model, arrays = golden
    close(model.latents(arrays["image"]), arrays["z_before_quant"])
    out = model(arrays["image"])
    clear = arrays["code_gap"] >= 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(out.codes[clear], arrays["codes"][clear].long())
    assert torch.equal(model.encode(arrays["image"]), out.codes)
    close(model.quantize(model.latents(arrays["image"])).latents, arrays["quantized"])
    close(out.images, arrays["reconstruction"])
    close(model.decode(arrays["codes"].long()), arrays["reconstruction"])


@torch.inference_mode()
def test_free_codes_decode_to_the_published_images(golden):
    model, arrays = golden
    close(model.decode(arrays["free_codes"].long().view(2, 16, 16)), arrays["free_codes_image"])


def test_the_shape_of_published_weights_is_inferred():
    assert config_of(load_file(GOLDEN / "llamagen_vq.safetensors")) == GOLDEN_CONFIG


@pytest.mark.parametrize(
    ("multipliers", "downsample", "parameters"), [((1, 1, 2, 2, 4), 16, 71_883_403), ((1, 2, 2, 4), 8, 70_109_835)]
)
def test_full_size_networks_have_the_published_number_of_parameters(multipliers, downsample, parameters):
    """VQ-16 is the 72 M, VQ-8 the 70 M of the LlamaGen paper (Table 2)."""
    config = VQConfig(16384, 8, 128, multipliers, 256)
    with torch.device("meta"):
        model = VQ(config)
        state = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    assert config.downsample == downsample
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config_of(state) == config


def nearest_by_hand(latents, table):
    """Walk every position and every code: normalise both, take the smallest squared distance, the first of equals."""
    batch, _, height, width = latents.shape
    codes = torch.zeros(batch, height, width, dtype=torch.int64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                vector = latents[b, :, y, x] / latents[b, :, y, x].norm()
                distances = [float(((vector - code / code.norm()) ** 2).sum()) for code in table]
                codes[b, y, x] = distances.index(min(distances))
    return codes


def test_the_quantizer_finds_what_a_walk_over_all_codes_finds(monkeypatch):
    monkeypatch.setattr(tokenizer, "LOOKUP_ROWS", 5)  # so that several chunks and a short last one occur
    quantizer = Quantizer(TINY)
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    table = quantizer.embedding.weight.detach()
    expected = nearest_by_hand(latents, table)
    out = quantizer(latents)
    assert torch.equal(out.codes, expected)
    unit = F.normalize(latents, dim=1)
    chosen = torch.stack([torch.stack([table[c] / table[c].norm() for c in row]) for row in expected.view(-1, 9)])
    close(out.latents.detach(), chosen.view(2, 3, 3, 4).permute(0, 3, 1, 2), 1e-6)
    distance = ((unit - out.latents.detach()) ** 2).mean()
    close(out.loss.detach(), distance * (1 + TINY.commitment), 1e-6)


def test_the_gradient_passes_the_quantizer_as_if_it_were_not_there():
    quantizer = Quantizer(TINY)
    weights = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    through, around = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    (quantizer(through).latents * weights).sum().backward()
    (F.normalize(around, dim=1) * weights).sum().backward()
    close(through.grad, around.grad, 1e-6)
    assert quantizer.embedding.weight.grad is None


def test_the_loss_moves_codes_by_the_first_term_and_latents_by_the_commitment():
    """Codes feel the first term alone, latents the commitment alone: doubling it doubles their gradient only."""
    gradients = {}
    for commitment in (0.25, 0.5):
        quantizer = Quantizer(VQConfig(16, 4, 8, (1,), 8, 1, commitment))
        torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(4))
        latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(5)).requires_grad_()
        quantizer(latents).loss.backward()
        gradients[commitment] = (latents.grad, quantizer.embedding.weight.grad)
    close(gradients[0.5][0], 2 * gradients[0.25][0], 1e-7)
    close(gradients[0.5][1], gradients[0.25][1], 1e-7)
    assert gradients[0.25][0].norm() > 1e-3 and gradients[0.25][1].norm() > 1e-3


def test_an_image_is_encoded_the_same_alone_and_among_others():
    torch.manual_seed(0)
    model = VQ(TINY).eval()
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    alone = torch.cat([model.encode(image[None]) for image in images])
    assert torch.equal(model.encode(images), alone)
    assert alone.shape == (3, 4, 4)


def test_decoded_pixels_are_truncated_not_rounded():
    values = torch.tensor([-1.5, -1.0, 0.0, 0.0039, 0.9999, 1.5]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    by_hand = [0, int(127.5 * -1.0 + 128), 128, int(127.5 * 0.0039 + 128), int(127.5 * 0.9999 + 128), 255]
    assert by_hand == [0, 0, 128, 128, 255, 255]
    found = to_uint8(values)
    assert found.shape == (1, 1, 6, 3) and found.dtype == torch.uint8
    assert found[0, 0, :, 0].tolist() == by_hand


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)


def test_an_image_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 2 pixels; got \(7, 8\)"):
        VQ(TINY).encode(torch.zeros(1, 3, 7, 8))


def tiny_state():
    torch.manual_seed(0)
    state = VQ(VQConfig(16, 4, 32, (1, 2), 32, 1)).state_dict()
    return {name: one if one.ndim < 2 or one.any() else torch.full_like(one, 0.01) for name, one in state.items()}


def test_a_published_checkpoint_is_read_and_its_usage_buffer_ignored(tmp_path):
    state = tiny_state()
    torch.save({"model": {**state, UNUSED_BUFFER: torch.zeros(65_536)}}, tmp_path / "vq.pt")
    found = read_vq(tmp_path / "vq.pt", expected=config_of(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_weights_of_another_shape_than_params_are_refused_by_name(tmp_path):
    state = tiny_state()
    save_file(state, tmp_path / "vq.safetensors")
    other = VQConfig(32, 4, 32, (1, 2, 2), 32, 1)
    with pytest.raises(ValueError) as error:
        read_vq(tmp_path / "vq.safetensors", expected=other)
    assert "tokenizer.codebook_size is 32 but the weights have 16" in str(error.value)
    assert "tokenizer.channel_multipliers is (1, 2, 2) but the weights have (1, 2)" in str(error.value)


def test_published_weights_want_the_published_number_of_norm_groups(tmp_path):
    """Weights do not tell the groups of a norm: other groups would load, and decode rubbish."""
    state = tiny_state()
    save_file(state, tmp_path / "vq.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer.norm_groups is 8 but the weights have 32"):
        read_vq(tmp_path / "vq.safetensors", expected=VQConfig(16, 4, 32, (1, 2), 32, 1, norm_groups=8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("decoder.mid.1.q.weight"), "1 missing (decoder.mid.1.q.weight)"),
        (lambda state: state.update(strange=torch.zeros(1)), "1 unknown (strange)"),
        (lambda state: state.update({"decoder.conv_out.bias": torch.zeros(4)}), "decoder.conv_out.bias (4,) for (3,)"),
        (lambda state: state.pop("encoder.conv_in.weight"), "'encoder.conv_in.weight' is missing"),
        (lambda state: state.update({"quantize.embedding.weight": torch.zeros(3)}), "quantize.embedding.weight is (3,)"),
    ],
)
def test_damaged_weights_are_refused_with_the_tensor_that_is_wrong(tmp_path, change, words):
    state = tiny_state()
    change(state)
    save_file(state, tmp_path / "vq.safetensors")
    with pytest.raises(ValueError) as error:
        read_vq(tmp_path / "vq.safetensors")
    assert words in str(error.value)


class _Runs:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    (tmp_path / "vq.pt").write_bytes(pickle.dumps({"model": _Runs()}))
    torch.save({"model": _Runs()}, tmp_path / "zip.pt")
    for name in ("vq.pt", "zip.pt"):
        with pytest.raises(ValueError, match="is refused"):
            read_vq(tmp_path / name)
    assert "never be printed" not in capsys.readouterr().out


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 1, 4), (3, 1)])
def test_the_images_that_fit_32_bit_indices_follow_from_the_largest_tensor(multipliers):
    """Watched at what every module reads and returns while one image is encoded."""
    model = VQ(VQConfig(16, 4, 8, multipliers, 8, residual_blocks=1, norm_groups=4)).eval()
    sizes = []
    for module in model.encoder.modules():
        module.register_forward_hook(lambda _, given, out: sizes.extend((given[0].numel(), out.numel())))
    model.latents(torch.zeros(1, 3, 16, 16))
    assert most_images(model.config, 16) == (2**31 - 1) // max(sizes)


def test_tf32_is_on_inside_the_network_and_off_in_the_lookup(monkeypatch):
    model, seen = VQ(VQConfig(16, 4, 8, (1, 2), 8, residual_blocks=1, norm_groups=4)).eval(), []
    for owner, name in ((VQ, "latents"), (Quantizer, "lookup")):
        real = getattr(owner, name)
        spy = lambda self, x, real=real: (seen.append(torch.backends.cudnn.allow_tf32), real(self, x))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    for precision in ("fp32", "tf32"):
        encode_at(model, torch.zeros(1, 3, 8, 8), precision)
    assert seen == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {f"vq_model.{name}": one for name, one in state.items()}, "is missing among vq_model.decoder"),
        (
            lambda state: {name: one * (one.ndim < 2 or "quantize" in name) for name, one in state.items()},
            "nothing but zeros",
        ),
        (lambda state: {**state, "encoder.conv_in.weight": torch.tensor(1.0)}, "a convolution has no dimensions"),
        (lambda state: {**state, "quantize.embedding.weight": torch.ones(16, 4)}, "holds one code 16 times"),
    ],
)
def test_weights_of_another_network_are_refused_with_the_name_of_the_file(tmp_path, change, words):
    save_file(change(VQ(VQConfig(16, 4, 32, (1, 2), 32, 1)).state_dict()), tmp_path / "vq.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        read_vq(tmp_path / "vq.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "vq.safetensors"))
