"""`dpar-cli score`, `compare`, `fetch` and `calibrate` from the command line."""

import hashlib
import http.server
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dpar_core.evaluation.features import DemoClassifier
from dpar_core.files import save_weights
from dpar_core.models.gpt import GPT, GPTConfig
from pipeline.cli import app
from pipeline.commands.score import _expected
from pipeline.download import download
from stages.params import load_params
from stages.tools.calibrate import checks
from tests.helpers.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
CLASSIFIER = "artifacts/features/demo_classifier.safetensors"


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    torch.manual_seed(0)
    (tmp_path / "artifacts" / "features").mkdir(parents=True)
    save_weights(
        tmp_path / CLASSIFIER,
        DemoClassifier(9).state_dict(),
        kind="demo_classifier",
        config={"num_classes": 9},
        meta={},
    )
    for name, count in (("a", 20), ("b", 20), ("c", 25), ("r", 40)):
        images = np.random.default_rng(ord(name)).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(word) for word in arguments])


def test_scores_are_printed_written_and_compared(place):
    for name in "abc":
        said = run(
            "score", f"{name}.npz", "--reference", "r.npz", "--bootstrap", 5, "--out", f"{name}.json", "--allow-singular"
        )
        assert said.exit_code == 0, said.exception
        assert "fd_demo" in said.output
        assert f"protocol {json.loads(Path(f'{name}.json').read_text())['protocol_id']}" in said.output
    assert run("compare", "a.json", "b.json").exit_code == 0
    Path("other").mkdir()
    shutil.copy("b.json", "other/a.json")
    both = run("compare", "a.json", "other/a.json").output
    assert "other/a.json: protocol" in both and "\na.json: protocol" in both
    refused = run("compare", "a.json", "c.json")
    assert refused.exit_code != 0
    assert "they differ in images 20 / 25" in str(refused.exception)
    forced = run("compare", "a.json", "c.json", "--force")
    assert forced.exit_code == 0
    assert "NOT COMPARABLE" in forced.output + (forced.stderr or "")


def test_scores_need_no_project(place, tmp_path_factory, monkeypatch):
    inside = run("score", "a.npz", "--reference", "r.npz", "--bootstrap", 0, "--allow-singular")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    outside = run(
        "score",
        place / "a.npz",
        "--reference",
        place / "r.npz",
        "--bootstrap",
        0,
        "--allow-singular",
        "--features-file",
        place / CLASSIFIER,
    )
    assert outside.exit_code == 0, outside.exception
    assert outside.output[outside.output.index("score  ") :] == inside.output[inside.output.index("score  ") :]
    demo = run("score", place / "a.npz", "--reference", place / "r.npz")
    assert "there is no project" in str(demo.exception) and "--features inception" in str(demo.exception)
    split = run("score", place / "a.npz", "--reference", "train", "--features-file", place / CLASSIFIER)
    assert "there is no project" in str(split.exception) and "name an npz or a folder" in str(split.exception)


def test_several_sets_are_seeds_and_get_a_spread(place):
    said = run("score", "a.npz", "b.npz", "--reference", "r.npz", "--bootstrap", 0, "--allow-singular")
    assert said.exit_code == 0, said.exception
    assert "sd over sets" in said.output
    shutil.copy("a.npz", "copy.npz")
    twice = run("score", "a.npz", "copy.npz", "--reference", "r.npz", "--bootstrap", 0, "--allow-singular")
    assert "a.npz and copy.npz hold the same images" in str(twice.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.npz", "--reference", "nowhere.npz"], "does not exist"),
        (["large.npz", "--reference", "r.npz"], "large.npz holds images of 48 x 48 pixels, the reference r.npz of 32 x 32"),
        (["objects.npz", "--reference", "r.npz"], "holds pickled objects"),
        (["junk.npz", "--reference", "r.npz"], "junk.npz is a text file, expected an npz"),
        (["none.npz", "--reference", "r.npz"], "none.npz holds 0 images: a distance needs at least two"),
        (["a.npz", "--reference", "half.npz"], "half.npz has mu_s without sigma_s"),
        (["a.npz", "--reference", "train"], "run `dpar-cli run data` first"),
        (["a.npz", "--reference", "r.npz", "--images", "21"], "holds 20 images, the protocol asks for 21"),
        (["a.npz", "--reference", "r.npz", "--features", "inception"], "needs --features-file"),
        (["a.npz", "--reference", "r.npz", "--sha256", "00"], "expected 00: fetch it again"),
        (["a.npz", "b.npz", "--reference", "r.npz", "--out", "x.json"], "--out takes the scores of one set"),
    ],
)
def test_what_cannot_be_scored_gets_a_sentence(place, arguments, words):
    np.savez("large.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 48, 48, 3), dtype=np.uint8))
    np.savez("objects.npz", arr_0=np.array([{}, 1], dtype=object))
    np.savez("none.npz", arr_0=np.zeros((0, 32, 32, 3), np.uint8))
    np.savez("half.npz", mu=np.zeros(64), sigma=np.eye(64), mu_s=np.zeros(448))
    Path("junk.npz").write_bytes(b"junk")
    said = run("score", *arguments)
    assert said.exit_code != 0
    assert words in str(said.exception)
    assert not Path("x.json").exists()


@pytest.fixture
def server(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    (served / "net.pt").write_bytes(bytes(range(256)) * 9000)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}/net.pt", hashlib.sha256((served / "net.pt").read_bytes()).hexdigest()
        one.shutdown()


def test_a_download_says_where_from_and_where_to_and_checks_its_digest(place, server):
    url, digest = server
    said = run("fetch", "inception", "--to", "w/net.pt", "--url", url, "--sha256", digest)
    assert said.exit_code == 0, said.exception
    assert url in said.output and str(place / "w" / "net.pt") in said.output.replace("\n", "") and digest in said.output
    assert hashlib.sha256(Path("w/net.pt").read_bytes()).hexdigest() == digest
    unasked = run("fetch", "--to", "w/published.pt", "--url", url)
    assert "expected f58cb9b6" in str(unasked.exception)
    with pytest.raises(ValueError, match="it is another file"):
        download(url, Path("w/other.pt"), sha256="11" * 32)
    with pytest.raises(ConnectionError, match=r"gone\.pt answers 404 \(File not found\)"):
        download(url.replace("net.pt", "gone.pt"), Path("new/deep/gone.pt"))
    with pytest.raises(ValueError, match="it is another file"):
        download(url, Path("new/deep/other.pt"), sha256="11" * 32)
    assert not Path("new").exists()
    assert sorted(path.name for path in Path("w").iterdir()) == ["net.pt"]


@pytest.mark.parametrize("url", ["", "w.pt", "/etc/passwd", "http://[::1", "s3://bucket/w.pt"])
def test_what_is_no_address_is_not_downloaded(tmp_path, url):
    with pytest.raises(ValueError, match="no address that can be read, expected one that begins with http"):
        download(url, tmp_path / "w.pt")


def test_a_download_that_breaks_off_gets_a_sentence_and_leaves_nothing(tmp_path):
    class Short(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ffff\r\nonly this")
            self.close_connection = True

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Short) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionError, match="broke off"):
            download(f"http://127.0.0.1:{one.server_port}/net.pt", tmp_path / "w" / "net.pt")
        one.shutdown()
    assert not (tmp_path / "w").exists()


def test_a_published_checkpoint_is_drawn_and_scored_against_what_is_expected(place):
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(64, 4, 32, 2, 2, ffn_multiple=32, num_classes=5))
    torch.nn.init.normal_(gpt.output.weight, std=0.2)
    torch.save({"model": gpt.state_dict()}, "gpt.pt")
    np.savez("small.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    arguments = [
        "calibrate",
        "--gpt",
        "gpt.pt",
        "--vq",
        GOLDEN / "llamagen_vq.safetensors",
        "--size",
        "tiny",
        "--heads",
        2,
        "--grid",
        4,
        "--cfg",
        1.5,
        "--reference",
        "small.npz",
        "--features",
        "demo",
        "--images",
        12,
        "--allow-singular",
    ]
    off = run(*arguments, "--expect", "fd_demo=1e9")
    if off.exit_code == 1 and off.exception and not isinstance(off.exception, SystemExit):
        raise off.exception
    assert off.exit_code == 1
    assert "DIFFERS" in off.output
    (first,) = Path("calibration").glob("scores-*.json")
    found = json.loads(first.read_text())
    (samples,) = Path("calibration").glob("samples-*/samples.npz")
    sampled = samples.stat().st_mtime_ns
    agrees = run(*arguments, "--expect", f"fd_demo={found['eval/fd_demo']}")
    assert agrees.exit_code == 0, agrees.exception
    assert "agrees" in agrees.output
    assert samples.stat().st_mtime_ns == sampled  # not sampled again
    other = run(*[1.0 if word == 1.5 else word for word in arguments], "--expect", "fd_demo=1")
    assert other.exit_code == 1
    (second,) = set(Path("calibration").glob("scores-*.json")) - {first}  # what was scored before is still there
    assert json.loads(second.read_text())["samples"]["cfg_scale"] == 1.0  # sampled anew
    pair = run(
        *[GOLDEN / "llamagen_gpt_c2i.safetensors" if word == "gpt.pt" else word for word in arguments], "--expect", "x=1"
    )
    assert "they are not a pair" in str(pair.exception)
    larger = run(*["B" if word == "tiny" else word for word in arguments], "--expect", "fd_demo=1")
    assert "has width 32 and 2 layers, LlamaGen-B has 768 and 12: give --size of these weights" in str(larger.exception)
    unknown = run(*arguments)
    assert "no published figures of LlamaGen-tiny" in str(unknown.exception)


def test_what_is_expected_is_measured_or_calibration_stops():
    measured = {"eval/fid": 5.5, "eval/is": 190.0}  # against statistics alone: neither precision nor recall
    assert [one.holds for one in checks(measured, {"eval/fid": 5.46, "eval/is": 250.0}, tolerance=0.05)] == [True, False]
    with pytest.raises(ValueError, match=r"^precision was not measured, but fid, is: "):
        checks(measured, {"eval/fid": 5.46, "eval/precision": 0.84}, tolerance=0.05)
    for words in (["fid=inf"], ["fid=nan"], ["fid=-1"], ["fid"], ["fid=5", "fid=6"]):
        with pytest.raises(ValueError, match=r"expected NAME=VALUE for different names, as fid=5\.46"):
            _expected("B", 16, words)


def test_help_of_each_command_names_what_it_reads_and_writes(place):
    assert load_params(Path("params.yaml")).score.features == "demo"
    for name in ("score", "compare", "fetch", "calibrate"):
        said = run(name, "--help")
        assert said.exit_code == 0
        assert "write" in said.output.lower() or "download" in said.output.lower()
