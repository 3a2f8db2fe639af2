"""The pinned packages: the image's lock files against pyproject.toml and constraints.txt, and what `make audit` says."""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

FOLDER = ROOT / "requirements"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
PINNED = {canonicalize_name(name): version for name, version in PINNED.items()}


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return version and hashes of the packages of a lock file, by name."""
    text = re.sub(r"\s*\\\n\s*", " ", (FOLDER / name).read_text())
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split(" --hash=sha256:")
            requirement = Requirement(pin)
            (only,) = requirement.specifier
            assert only.operator == "=="
            found[canonicalize_name(requirement.name)] = (only.version, hashes)
    return found


LOCKS = {path.name: locked(path.name) for path in FOLDER.glob("*.lock")}


@pytest.mark.parametrize("name", LOCKS)
def test_locked_versions_are_the_pinned_ones_and_every_package_has_hashes(name):
    assert LOCKS[name]
    for package, (version, hashes) in LOCKS[name].items():
        if not package.startswith(("nvidia-", "cuda-", "triton")):  # what torch for CUDA brings is pinned by its lock alone
            assert version.removesuffix("+cpu") == PINNED[package], f"{package}: run `make lock`"
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes)


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_image_has_every_package_that_the_project_asks_for(torch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    installed = LOCKS["image.lock"] | LOCKS[f"torch-{torch}.lock"]
    for requirement in map(Requirement, asked):
        version, _ = installed[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version.removesuffix("+cpu")), f"{requirement}: run `make lock`"
    assert not LOCKS["image.lock"].keys() & LOCKS[f"torch-{torch}.lock"].keys()


@pytest.mark.parametrize("name", ["Dockerfile", "docs/cluster/Dockerfile"])
def test_images_install_nothing_without_hashes_but_this_project_itself(name):
    text = (ROOT / name).read_text().replace("\\\n", " ").replace("$TORCH", "cpu")
    installs = re.findall(r"pip install[^&\n]*", text)
    for words in installs[:2]:
        assert "--require-hashes" in words and "--no-deps" in words
    assert len(installs) == 3 and {"--no-deps", "--no-build-isolation", "--no-index"} <= set(installs[2].split())
    locks = re.findall(r"requirements/([\w-]+\.lock)", text)
    assert locks[:2] == ["build.lock", "image.lock"] and locks[2] in LOCKS and len(locks) == 3
    major, minor = _lock().PYTHON
    assert re.search(
        rf"^FROM (python:{major}\.{minor}-slim|rayproject/ray:[\d.]+-py{major}{minor}-gpu)$", text, re.MULTILINE
    )


def _lock():
    import importlib.util

    spec = importlib.util.spec_from_file_location("lock", FOLDER / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_lock_holds_the_files_that_the_image_can_install(monkeypatch, tmp_path):
    lock = _lock()
    sums = {letter: letter * 64 for letter in "abcdef"}

    def file(name, letter):
        return {"name": name, "hashes": {"sha256": sums[letter]}}

    wheels = [
        file("fast-1.0-cp313-cp313-manylinux_2_17_x86_64.whl", "c"),
        file("fast-1.0-cp312-cp312-manylinux_2_17_x86_64.whl", "d"),
        file("fast-1.0-cp39-abi3-manylinux2014_aarch64.whl", "b"),
        file("fast-1.0-cp313-cp313-macosx_11_0_arm64.whl", "e"),
    ]
    packages = [
        {"name": "fast", "version": "1.0", "sdist": file("fast-1.0.tar.gz", "f"), "wheels": wheels},
        {"name": "built", "version": "2", "sdist": file("built-2.tar.gz", "a")},
        {
            "name": "one",
            "version": "3",
            "marker": "platform_machine == 'x86_64'",
            "wheels": [file("one-3-py3-none-any.whl", "a")],
        },
        {
            "name": "other",
            "version": "4",
            "marker": "sys_platform == 'win32'",
            "wheels": [file("other-4-py3-none-any.whl", "a")],
        },
    ]
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    (tmp_path / "requirements").mkdir()
    lock.write("image.lock", packages)
    assert (tmp_path / "requirements" / "image.lock").read_text().splitlines()[1:] == [
        "built==2 \\",
        f"    --hash=sha256:{sums['a']}",
        "fast==1.0 \\",
        f"    --hash=sha256:{sums['b']} \\",
        f"    --hash=sha256:{sums['c']}",
        'one==3 ; platform_machine == "x86_64" \\',
        f"    --hash=sha256:{sums['a']}",
    ]


SOUND = {"name": "a", "version": "1", "vulns": []}
ADVISED = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "sentence"),
    [
        ([SOUND], 0, "1 of 1 pinned packages audited, 0 with advisories"),
        ([SOUND, ADVISED, UNKNOWN], 1, "b 2: CVE-1, mended in 2.1\n2 of 3 pinned packages audited, 1 with advisories"),
        ([SOUND, UNKNOWN], 2, "1 packages were not audited, as the service knows nothing of them: c"),
        (None, 2, "nothing was audited, as pip-audit ended with status 1 (no route to host)"),
    ],
    ids=["sound", "advisory", "unknown to the service", "no service"],
)
def test_an_audit_tells_advisories_from_a_service_that_did_not_answer(packages, status, sentence, tmp_path):
    program = tmp_path / "pip-audit"
    body = (
        "import sys; sys.exit('no route to host')"
        if packages is None
        else f"import json; print(json.dumps({dict(dependencies=packages)}))"
    )
    program.write_text(f"#!{sys.executable}\n{body}\n")
    program.chmod(0o755)
    done = subprocess.run([sys.executable, FOLDER / "audit.py", program], capture_output=True, text=True)
    assert done.returncode == status and sentence in done.stdout + done.stderr
