"""Joining a cluster: seconds until a sentence with the way out; an own cluster leaves nothing behind and shows no token."""

import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.workers import cluster
from tests.helpers.mlflow_stores import closed_port, silent_server
from tests.helpers.processes import gone


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, "refused"),
        ("no.such.host.invalid:6379", "no Ray cluster answers at RAY_ADDRESS=no.such.host.invalid:6379"),
        ("ray://me:hunter2@127.0.0.1:1", "RAY_ADDRESS=ray://\\*\\*\\*@127.0.0.1:1"),
    ],
)
def test_a_dead_address_is_a_sentence_at_once(address, words):
    address = address or closed_port().removeprefix("http://")
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=words) as caught:
        cluster._ask(address)
    assert time.monotonic() - began < 100
    assert "unset RAY_ADDRESS" in str(caught.value) and "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("value", "address"), [("", None), (" ", None), ("local", None), ("auto", "auto"), ("h:1", "h:1")])
def test_no_address_and_rays_word_for_this_machine_mean_a_cluster_of_our_own(monkeypatch, value, address):
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster.foreign_address() == address


def test_an_address_that_never_answers_is_a_sentence_within_seconds(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 3.0)
    words = r"no answer within 3 s.*set RAY_AUTH_MODE=token.*unset RAY_ADDRESS"
    with silent_server() as uri, pytest.raises(ConnectionError, match=words):
        cluster._ask(uri.removeprefix("http://"))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("AuthenticationError", "Failed to connect", "asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ("RaySystemError", "rpc: Unauthenticated: bad token", "asks for a token"),
        ("RuntimeError", "Version mismatch: the cluster was started with:\n Ray: 2.1", "runs other versions .*Ray: 2.1"),
        ("ConnectionError", "Could not find any running Ray instance", "start it, or unset RAY_ADDRESS"),
    ],
)
def test_what_a_cluster_answers_is_named(kind, text, words):
    error = cluster._refusal("10.0.0.1:6379", kind, text)
    assert isinstance(error, ConnectionError)
    with pytest.raises(ConnectionError, match=words):
        raise error


def test_a_cluster_of_another_user_of_this_machine_is_named_with_the_file_that_ray_cannot_write(monkeypatch):
    said = "[E 1] logging.cc:118: Unhandled exception: E. what(): Failed opening /t/event.log: Permission denied\n@ calls\n"
    died = subprocess.CompletedProcess([], -6, stdout="", stderr=f"{said}Extension modules: msgpack")
    monkeypatch.setattr(cluster.subprocess, "run", lambda *_, **__: died)
    monkeypatch.setattr(cluster.socket, "create_connection", lambda *_, **__: io.BytesIO())
    with pytest.raises(ConnectionError, match=r"another user, .*\(Failed opening /t/event.log: Permission denied\)"):
        cluster._ask("127.0.0.1:6379")


def test_ray_that_cannot_start_here_is_a_sentence():
    error = cluster._refusal(None, "Exception", "The current node timed out during startup. This\ncould happen because")
    assert isinstance(error, RuntimeError)
    assert "could not start on this machine" in str(error) and "use one worker" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("address", "seconds", "said"), [(None, 0.3, True), (None, 0.0, False), ("there:6379", 0.3, False)])
def test_a_start_of_ray_that_takes_long_is_said_before_ray_gives_up(home, monkeypatch, capsys, address, seconds, said):
    import ray

    monkeypatch.setattr(cluster, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "_ask", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda **_: time.sleep(seconds))
    with cluster._started(address):
        pass
    printed = capsys.readouterr().err
    assert ("Ray is still starting after 0.05 s" in printed and "use one worker" in printed) == said


def test_the_token_of_an_own_cluster_is_for_this_user_alone(home):
    path = home / ".ray" / "auth_token"
    old = os.umask(0o022)
    try:
        cluster._keep_token_private()
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) >= 32
    path.write_text("mine, made by `ray get-auth-token --generate`")
    path.chmod(0o644)
    cluster._keep_token_private()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text().startswith("mine")
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_home_that_cannot_be_written_gets_a_token_in_the_environment(home, monkeypatch):
    (home / ".ray").write_text("no folder")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cluster._keep_token_private()
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32


def test_folders_of_killed_processes_are_removed_and_those_of_live_ones_are_not(home, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    base = Path("/tmp")
    dead = base / f"dpar-ray-{os.getuid()}-999999999-test"
    alive = base / f"dpar-ray-{os.getuid()}-{os.getppid()}-test"
    for folder in (dead, alive):
        (folder / "session").mkdir(parents=True)
    mine = cluster._own_folder()
    try:
        assert not dead.exists() and alive.exists() and mine.is_dir()
        assert len(f"{mine}/session_2026-11-27_16-00-00_123456_1234567/sockets/plasma_store") <= 107
    finally:
        for folder in (alive / "session", alive, mine):
            folder.rmdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 10)))
    assert cluster._own_folder() is None


FINDS = """
from stages.workers import cluster
def main():
    import ray
    with cluster.connected() as nodes:
        @ray.remote(num_cpus=1)
        def where():
            import importlib, os, stages
            return stages.__file__, os.stat(os.path.expanduser("~/.ray/auth_token")).st_mode & 0o777
        print(*ray.get(where.remote()), flush=True)
main()
"""


@pytest.mark.slow
def test_workers_run_our_code_and_the_session_leaves_no_folder(home, tmp_path):
    from tests.helpers.paths import ROOT

    (tmp_path / "stages.py").write_text("raise SystemExit('code of the current folder was run')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp"}
    before = set(Path("/tmp").glob("dpar-ray-*"))
    found = subprocess.run(
        [sys.executable, "-P", "-c", FINDS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.stdout.split() == [str(ROOT / "stages" / "__init__.py"), str(0o600)], found.stderr
    assert set(Path("/tmp").glob("dpar-ray-*")) <= before


KILLED = """
import subprocess, sys
from stages.workers.cluster import _agents_of_own
raylet = subprocess.Popen([sys.argv[1], "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
print(raylet.stdout.readline(), end="", flush=True)
agents = _agents_of_own()
print("at work", flush=True)
input()
agents.communicate()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are neither sh nor signals")
@pytest.mark.parametrize("killed", [True, False])
def test_agents_of_an_own_cluster_end_with_its_driver(tmp_path, killed):
    (tmp_path / "raylet").symlink_to(shutil.which("bash"))
    words = [sys.executable, "-c", KILLED, str(tmp_path / "raylet")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        agent = int(driver.stdout.readline())
        assert driver.stdout.readline() == "at work\n" and not gone(agent, seconds=0.1)
        if killed:
            driver.kill()
        else:
            driver.communicate("\n")
    assert gone(agent)


def test_the_process_that_asks_prints_what_ray_said(home):
    lines = (
        "import sys",
        "from ray._private import services",
        "services.find_gcs_addresses = none = lambda: set()  # clusters of tests beside this one are not there",
        "none.cache_clear = lambda: None",
        "sys.argv[1:] = ['auto']",
        "from stages.workers.cluster import main",
        "main()",
    )
    words = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "RAY_TMPDIR": str(home)}, timeout=600)
    assert json.loads(found.stdout.splitlines()[-1])["kind"] == "ConnectionError"


def test_an_ipv6_address_is_understood():
    with socket.socket(socket.AF_INET6) as server:
        try:
            server.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match="refused"):
        cluster._ask(f"[::1]:{port}")
