"""Every command of dpar-cli with hostile arguments, in a project that has everything, each in a forked process.

    python -m tests.fuzz.commands [--project FOLDER] [--only sample] [--seed 7 --calls 500]

A command may do its work, refuse (exit 1 or 2), and has to say something when it refuses. A traceback, an error that nobody
foresaw (exit 70), a signal, over a minute by the clock or 5 s of CPU is a finding. Environment variables are tried alike.
Root calls them as another user, who may not read everything. --project keeps the project for a later call. With --seed,
calls have one to three hostile values of random parameters, altered and joined at random. Exit 1 when there are findings.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

PATIENCE = 60.0
CPU_SECONDS = 5.0
NOBODY = 65534  # whom root calls the commands as, where others may read this Python
AS_NOBODY = os.getuid() == 0 and all(folder.stat().st_mode & 0o1 for folder in Path(os.__file__).resolve().parents)
MEMORY = 3 << 30
GROUPS = {"params": ("show", "use", "check", "list"), "runs": ("show", "sync"), "sweep": ("threshold", "cfg")}

# The words of a command that does little and succeeds, or is refused at once where the work would be long.
SOUND: dict[str, list[str]] = {
    "init": ["--images", "pictures", "--into", "links", "--force"],
    "run": ["nothing"],
    "status": [],
    "cost": ["smoke"],
    "probe": ["--images", "4", "--held-out", "2", "--out", "probe.json"],
    "score": [
        "artifacts/samples/dpar.npz",
        "--reference",
        "artifacts/samples/llamagen.npz",
        "--bootstrap",
        "0",
        "--allow-singular",
    ],
    "compare": ["artifacts/scores/dpar.json"],
    "fetch": ["inception", "--to", "w.pt", "--url", "http://127.0.0.1:9/w.pt"],
    "calibrate": [
        "--gpt",
        "x.pt",
        "--vq",
        "y.pt",
        "--size",
        "B",
        "--cfg",
        "2",
        "--reference",
        "artifacts/samples/dpar.npz",
        "--features",
        "demo",
    ],
    "stage": ["nothing"],
    "ui": ["--port", "1", "--no-browser"],  # which needs rights: else it serves until it is stopped
    "verify": ["pictures"],
    "sample": ["--classes", "0", "--count", "1", "--out", "s.png"],
    "params show": [],
    "params use": ["smoke", "--force"],
    "params check": [],
    "params list": [],
    "data inspect": ["train", "--out", "i.png"],
    "data check": [],
    "patches image": ["picture.png", "--out", "p.png"],
    "patches stats": ["--thresholds", "1", "--out", "st.png"],
    "sweep threshold": ["--name", "n", "--trials", "1", "--search", "nothing"],
    "sweep cfg": ["--name", "n", "--trials", "1", "--search", "nothing"],
    "metrics": [],
    "runs": [],
    "runs show": ["0"],
    "runs sync": [],
    "doctor": [],
}

TEXTS = (
    "",
    " ",
    "x" * 300,
    "x/" * 3000,
    "ä\u202e😀",
    "\udcff\udcfe",
    "[/b]",
    "[bold red]",
    "{x}",
    "%s%n",
    "a\nb",
    "\x1b[31m",
    "-",
    "--",
    "~root",
    "-1",
    "0",
    "1",
    "1e400",
    "nan",
    "-inf",
    "1" * 5000,
    "0x10",
    "1_0",
    "١",
    "true",
    "none",
    "null",
    "1,2,,3",
    ",",
    "1," * 2000,
    "..",
    "/",
    "$(id)",
    "http://u:pw@127.0.0.1:9/x?token=abc",
    "file:///etc/passwd",
    "s3://KEY:SECRET@b/x",
    "ftp://127.0.0.1:9/x",
    "http://[::1",
    "http:///",
    "://",
    "a:b",
)
NUMBERS = (
    "",
    " ",
    "x" * 300,
    "[/b]",
    "-1",
    "0",
    "1",
    "1e400",
    "nan",
    "-inf",
    "1" * 5000,
    "0x10",
    "1_0",
    "١",
    "true",
    "\udcff",
)
FILES = (
    "hostile/empty",
    "hostile/folder",
    "hostile/fifo",
    "hostile/socket",
    "hostile/loop",
    "hostile/dangling",
    "hostile/closed",
    "hostile/text",
    "hostile/noise",
    "hostile/sparse",
    "hostile/empty.npz",
    "hostile/noise.npz",
    "hostile/noise.pt",
    "hostile/fifo.npz",
    "hostile/empty.json",
    "hostile/text/below",
    "hostile/missing/below",
    "hostile/deep.json",
    "hostile/deep.yaml",
    "hostile/picture.png",
    "hostile/bomb.png",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/proc/self/mem",
    "/proc/self/environ",
    "/nonexistent/x",
)
VARIABLES = {
    "MLFLOW_TRACKING_URI": (
        "",
        "x",
        "file:///dev/null",
        "postgresql://u:pw@127.0.0.1:9/x",
        "http://u:pw@127.0.0.1:9",
        "ftp://x",
        "http://[::1",
        "sqlite:////dev/full",
        "sqlite:///hostile/noise",
        "databricks",
    ),
    "RAY_ADDRESS": ("", "x", "127.0.0.1:9", "ray://127.0.0.1:9", "http://u:pw@127.0.0.1:9", "\udcff"),
    "DPAR_CACHE": ("", "/dev/null", "/dev/null/x", "hostile/text", "\udcff", "x" * 5000),
    "HOME": ("", "/nonexistent", "/dev/null", "\udcff"),
    "TMPDIR": ("", "/nonexistent", "/dev/null"),
    "COLUMNS": ("", "0", "-1", "1", "1" * 30, "x"),
    "TERM": ("", "dumb", "x" * 300),
    "LC_ALL": ("C", "xx_XX", ""),
    "TZ": ("", "xx", "/etc/passwd"),
    "OMP_NUM_THREADS": ("", "x", "-1"),
    "PYTHONIOENCODING": ("ascii", "latin-1"),
    "CUDA_VISIBLE_DEVICES": ("", "x", "-1", "99"),
    "NO_COLOR": ("", "1"),
    "MLFLOW_EXPERIMENT_NAME": ("", "\udcff", "x" * 5000),
}


@dataclass(frozen=True)
class Ended:
    """How a call ended. status: None where it hung. cpu: seconds of this process alone."""

    status: int | None
    said: str
    cpu: float = 0.0


def hostile_files(folder: Path) -> None:
    """Make the files of FILES."""
    from PIL import Image

    (folder / "folder").mkdir(parents=True)
    for name in ("empty", "empty.npz", "empty.json"):
        (folder / name).touch()
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo.npz")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the address of a socket is short
        server.bind("socket")
        os.chdir(here)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "text").write_text("train: [\n")
    noise = bytes(range(256)) * 40
    for name in ("noise", "noise.npz", "noise.pt", "closed"):
        (folder / name).write_bytes(noise)
    (folder / "closed").chmod(0)
    with open(folder / "sparse", "wb") as stream:
        stream.truncate(1 << 40)
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "deep.yaml").write_text("a: " + "[" * 20_000)
    Image.new("RGB", (7, 5)).save(folder / "picture.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")


def make_project(root: Path) -> Path:
    """Return a project with all artifacts."""
    from PIL import Image

    from pipeline.runner import STAGES
    from tests.faults.processes import adopt_orphans, import_everything
    from tests.faults.project import World
    from tests.helpers.paths import ROOT

    adopt_orphans()
    import_everything(list(STAGES), mlflow=True)
    world = World(root / "world")
    world.root.mkdir(parents=True)
    world.make(list(STAGES), print)
    project = world.whole
    shutil.copytree(ROOT / "params", project / "params")
    shutil.copytree(world.root / "images" / "train", project / "pictures")
    Image.new("RGB", (8, 8)).save(project / "picture.png")
    hostile_files(project / "hostile")
    return project


def commands() -> dict[str, list[Any]]:
    """Return the parameters of every command, by its words."""
    import typer

    from pipeline.cli import app

    found: dict[str, list[Any]] = {}

    def walk(command: Any, words: list[str]) -> None:
        children = getattr(command, "commands", None) or {}
        for name, child in children.items():
            walk(child, [*words, name])
        if words and (not children or getattr(command, "invoke_without_command", False)):
            found[" ".join(words)] = list(command.params)

    walk(typer.main.get_command(app), [])
    return found


def calls(only: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield (arguments, environment) of every call."""
    for name, parameters in commands().items():
        if only and not name.startswith(only):
            continue
        sound = SOUND[name]
        yield [*name.split(), *sound], {}
        yield [*name.split(), "--nothing"], {}
        for parameter in parameters:
            if parameter.opts[0] == "--help":
                continue
            flag = bool(getattr(parameter, "is_flag", False))
            if flag:
                yield [*name.split(), *sound, parameter.opts[0]], {}
                continue
            option, kind = parameter.opts[0], str(vars(parameter).get("type_descriptor"))
            for value in (*TEXTS, *FILES) if "Path" in kind or "str" in kind else NUMBERS:
                if not option.startswith("-"):
                    rest = sound[1:] if sound and not sound[0].startswith("-") else sound
                    yield [*name.split(), "--", value, *[]] if not rest else [*name.split(), *rest, "--", value], {}
                elif option in sound:
                    place = sound.index(option)
                    yield [*name.split(), *sound[:place], *sound[place + 2 :], f"{option}={value}"], {}
                else:
                    yield [*name.split(), *sound, f"{option}={value}"], {}
    for variable, settings in VARIABLES.items():
        for setting in settings:
            for words in (
                ["status"],
                ["doctor"],
                ["runs"],
                ["stage", "rule"],
                ["sample", *SOUND["sample"]],
                ["cost", "smoke"],
            ):
                if not only or words[0].startswith(only):
                    yield words, {variable: setting}


def random_calls(only: str, seed: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield (arguments, environment) without end: one to three hostile values per call, some cut, joined or doubled."""
    rng = random.Random(seed)
    known = [(name, parameters) for name, parameters in commands().items() if name.startswith(only)]
    variables = [(name, setting) for name, settings in VARIABLES.items() for setting in settings]

    def value() -> str:
        one, other = rng.choice((*TEXTS, *NUMBERS, *FILES)), rng.choice((*TEXTS, *NUMBERS, *FILES))
        cut = rng.randrange(len(one) + 1)
        return rng.choice((one, one, one, one[:cut] + other, f"{one},{other}", f"{one}={other}", one[::-1], one * 2))

    while True:
        name, parameters = rng.choice(known)
        words = list(SOUND[name])
        chosen = [one for one in parameters if one.opts[0] != "--help"]
        for parameter in rng.sample(chosen, min(len(chosen), rng.randint(1, 3))):
            option = parameter.opts[0]
            if getattr(parameter, "is_flag", False):
                words.append(option)
            elif not option.startswith("-"):
                words = [*(words[1:] if words and not words[0].startswith("-") else words), "--", value()]
            elif "--" in words:
                words.insert(words.index("--"), f"{option}={value()}")
            elif option in words:
                words[words.index(option) + 1] = value()
            else:
                words.append(f"{option}={value()}")
        yield [*name.split(), *words], dict([rng.choice(variables)]) if rng.random() < 0.15 else {}


def call(project: Path, words: list[str], environment: dict[str, str]) -> Ended:
    """Run dpar-cli with these arguments in a forked process."""
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdin = os.fdopen(0)
            encoding = "ascii" if environment.get("PYTHONIOENCODING") == "ascii" else "utf-8"
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding, line_buffering=True)
            sys.stderr = io.TextIOWrapper(
                os.fdopen(2, "wb", 0, closefd=False), encoding, "backslashreplace", write_through=True
            )
            os.environ |= {"RAY_ADDRESS": "127.0.0.1:9", "COLUMNS": "80"}
            os.environ |= environment
            tempfile.tempdir = None
            os.chdir(project)
            if AS_NOBODY:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            sys.argv[:] = ["dpar-cli", *words]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY,) * 2)
            from pipeline.cli import main

            status = 0
            try:
                main()
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            sys.stdout.flush()
            os._exit(status)
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode(errors="replace"))
            os._exit(99)
    os.close(writing)
    said, status, cpu = b"", None, 0.0
    while time.monotonic() - began < PATIENCE:
        ready, _, _ = select.select([reading], [], [], 0.05)
        if ready and (piece := os.read(reading, 1 << 16)):
            said = (said + piece)[-200_000:]
            continue
        found, code, used = os.wait4(child, os.WNOHANG)
        if found:
            status, cpu = os.waitstatus_to_exitcode(code), used.ru_utime + used.ru_stime
            break
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(reading)
    return Ended(status, said.decode(errors="replace"), cpu)


def problem(ended: Ended) -> str | None:
    """Return what is wrong with the end of a command."""
    if ended.status is None:
        return f"hung: {ended.said[-200:]!r}"
    if "Traceback (most recent call last)" in ended.said:
        return f"traceback: {ended.said[-300:]!r}"
    if ended.status not in (0, 1, 2):
        return f"status {ended.status}: {ended.said[-300:]!r}"
    if ended.cpu > CPU_SECONDS:
        return f"{ended.cpu:.1f} s of CPU: {ended.said[-300:]!r}"
    if ended.status and not ended.said.strip():
        return f"status {ended.status} without a word"
    if "pw@" in ended.said or "SECRET" in ended.said or "token=abc" in ended.said:
        return f"credentials shown: {ended.said[-300:]!r}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--project", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--calls", type=int, default=500)
    options = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="dpar-commands-", dir=memory))
    root.chmod(0o755)
    os.environ |= {"OMP_NUM_THREADS": "1", "DPAR_CACHE": str(root / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    kept = options.project
    if kept is None or not kept.exists():
        made = make_project(root)
        if kept is not None:
            shutil.copytree(made, kept, symlinks=True, copy_function=_copy)
    from pipeline.runner import STAGES
    from tests.faults.processes import import_everything

    import_everything(list(STAGES), mlflow=True)
    base = kept or made
    project, tried, found = root / "project", 0, 0
    try:
        seeded = options.seed is not None
        chosen = islice(random_calls(options.only, options.seed), options.calls) if seeded else calls(options.only)
        for words, environment in chosen:
            if tried % 25 == 0:
                shutil.rmtree(project, ignore_errors=True)
                shutil.copytree(base, project, symlinks=True, copy_function=_copy)
                _give_away(project)
            tried += 1
            ended = call(project, words, environment)
            if (
                ended.status is None
            ):  # a fork may hold a lock that its parent's threads held: what hangs by itself hangs again
                ended = call(project, words, environment)
            if (what := problem(ended)) is not None:
                found += 1
                shown = [one if len(one) < 60 else f"{one[:30]}... ({len(one)})" for one in words]
                print(f"{environment or ''} {shown!r}: {what}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"{tried} calls, {found} findings")
    sys.exit(1 if found else 0)


def _give_away(folder: Path) -> None:
    """Make a folder that of the user who calls the commands, without the rights of root where this is root."""
    if AS_NOBODY:
        for where, folders, names in os.walk(folder):
            for name in (".", *folders, *names):
                os.chown(os.path.join(where, name), NOBODY, NOBODY, follow_symlinks=False)


def _copy(source: str, target: str) -> None:
    if Path(source).is_file() and os.stat(source).st_size < 1 << 30:
        shutil.copy2(source, target)
    elif Path(source).is_file():
        with open(target, "wb") as stream:
            stream.truncate(os.stat(source).st_size)
    elif Path(source).is_fifo():
        os.mkfifo(target)


if __name__ == "__main__":
    main()
