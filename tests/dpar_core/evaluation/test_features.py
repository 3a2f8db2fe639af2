"""Feature networks from files: weights that are not finite and damaged programs are refused before anything is computed."""

import io
import zipfile

import numpy as np
import pytest
import torch

from dpar_core.evaluation import features
from dpar_core.evaluation.features import DemoClassifier, demo_network, dinov2_network, inception_network, load_script
from dpar_core.files import save_weights


@pytest.fixture(autouse=True)
def rehearse(monkeypatch):
    """Leave out the process that meets a program first: it takes seconds to import torch."""
    before = features._rehearse
    monkeypatch.setattr(features, "_rehearse", lambda path: None)
    return before


def test_a_demo_classifier_with_nan_is_refused(tmp_path):
    state = DemoClassifier(3).state_dict()
    state["norms.1.bias"][3] = float("nan")
    save_weights(tmp_path / "c.safetensors", state, kind="demo_classifier", config={"num_classes": 3}, meta={})
    with pytest.raises(ValueError, match=r"not finite in 1 of \d+ tensors \(norms.1.bias\)"):
        demo_network(tmp_path / "c.safetensors", "cpu")


@pytest.fixture(scope="module")
def script():
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(4, 2)), stream)
    return stream.getvalue()


def test_a_torchscript_with_infinite_weights_is_refused(tmp_path):
    model = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(model.weight, float("inf"))
    torch.jit.script(model).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"not finite in 1 of 2 tensors \(weight\)"):
        load_script(tmp_path / "x.pt", "cpu")


def test_damage_is_found_before_libtorch_reads_the_file(tmp_path, script, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("libtorch met a damaged file"))
    with zipfile.ZipFile(io.BytesIO(script)) as archive:
        contents = [archive.read(one) for one in archive.infolist() if one.compress_type == zipfile.ZIP_STORED]
    places = [script.index(content) + len(content) // 2 for content in contents if len(content) > 8]
    assert places
    for place in places:
        damaged = bytearray(script)
        damaged[place] ^= 0x10
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load_script(tmp_path / "x.pt", "cpu")
    (tmp_path / "x.pt").write_bytes(script[: len(script) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_script(tmp_path / "x.pt", "cpu")


@pytest.mark.parametrize("frozen", [False, True], ids=["parameters", "constants"])
@pytest.mark.parametrize("left", [0, 24], ids=["empty", "short"])
def test_a_tensor_that_is_longer_than_what_is_stored_for_it_is_refused(tmp_path, monkeypatch, frozen, left):
    model = torch.jit.script(torch.nn.Linear(4, 2).eval())
    model = torch.jit.freeze(model) if frozen else model
    model.save(str(tmp_path / "x.pt"))
    load_script(tmp_path / "x.pt", "cpu")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    name = next(name for name, content in entries.items() if len(content) == 32 and name[-1].isdigit())
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for one, content in entries.items():
            archive.writestr(one, content[:left] if one == name else content)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("libtorch met a damaged file"))
    with pytest.raises(
        ValueError, match=rf"is damaged \(its tensor \d has 8 values, and {left} bytes are stored for them\)"
    ):
        load_script(tmp_path / "x.pt", "cpu")


class Narrow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("few", torch.zeros(4).to(torch.float8_e4m3fn))

    def forward(self, images):
        return images


def test_tensors_of_eight_bits_are_read_and_those_of_an_unknown_type_are_not_called_damage(tmp_path, monkeypatch):
    torch.jit.script(Narrow()).save(str(tmp_path / "x.pt"))
    assert dict(load_script(tmp_path / "x.pt", "cpu").named_buffers())["few"].dtype == torch.float8_e4m3fn
    monkeypatch.delitem(features._WIDTHS, "Float8_e4m3fn")
    with pytest.raises(ValueError, match=r"x\.pt holds a tensor of the type Float8_e4m3fn, which cannot be read here"):
        load_script(tmp_path / "x.pt", "cpu")


def test_a_program_that_kills_its_reader_ends_in_a_sentence(tmp_path, script, rehearse, monkeypatch):
    (tmp_path / "x.pt").write_bytes(script)
    rehearse(tmp_path / "x.pt")
    monkeypatch.setattr(features, "_REHEARSAL", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ValueError, match=r"x.pt is not a TorchScript file that can be read \(its reader died of signal 11"):
        rehearse(tmp_path / "x.pt")
    monkeypatch.setattr(features, "_REHEARSAL", "import sys; sys.exit('no room for 3 GB')")
    with pytest.raises(ValueError, match="no room for 3 GB"):
        rehearse(tmp_path / "x.pt")


def test_a_zip_without_a_program_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="zip archive without a TorchScript program"):
        load_script(tmp_path / "x.pt", "cpu")


class Maps(torch.nn.Module):
    """Gives feature maps where features are expected; has a class layer, as Inception has."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("maker", "words"),
    [(dinov2_network, r"gives \(2, 3, 224, 224\) for 2 images"), (inception_network, r"fails on \(2, 3, 8, 8\) images")],
)
def test_a_script_of_another_interface_is_refused(tmp_path, maker, words):
    torch.jit.script(Maps()).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=words) as caught:
        maker(tmp_path / "x.pt", "cpu")(np.zeros((2, 8, 8, 3), np.uint8))
    assert "\n" not in str(caught.value)
