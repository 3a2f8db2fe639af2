"""Write the hash-locked requirements of the image from pyproject.toml and constraints.txt: `make lock`.

build.lock holds what packages are built with, image.lock every package but torch, torch-cpu.lock and torch-cuda.lock
torch with what it brings. A hash stands for one file: the wheels that CPython 3.13 on Linux (x86_64 and aarch64, glibc) can
install, the source where there is none.

The resolver is uv, called as the first argument; it asks the index that it is configured for. CPU builds of torch are listed
by an index of their own, the second argument. Where that cannot be reached, the present torch-cpu.lock stays if it is of
the pinned version.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parent.parent
PYTHON = (3, 13)
MACHINES = ("x86_64", "aarch64")
GLIBC = range(5, 37)  # 2.36: Debian 12
FOR_CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # what the CPU build of torch does without


def resolved(uv: str, requirements: list[str], *options: str) -> list[dict[str, Any]]:
    """Return the packages that requirements need under our constraints, as entries of a pylock.toml (PEP 751)."""
    with tempfile.TemporaryDirectory() as folder:
        (asked := Path(folder, "requirements.in")).write_text("\n".join(requirements))
        target = Path(folder, "pylock.toml")
        version = ".".join(map(str, PYTHON))
        words = [uv, "pip", "compile", asked, "-c", ROOT / "constraints.txt", "--universal", "--python-version", version]
        subprocess.run([*map(str, words), "-q", "--format", "pylock.toml", "-o", str(target), *options], check=True)
        return list(tomllib.loads(target.read_text())["packages"])


def tags_of(machine: str) -> set[Tag]:
    """Return the tags of wheels that can be installed on a machine."""
    old = ("manylinux2014", "manylinux2010", "manylinux1")
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC] + [f"{name}_{machine}" for name in old]
    name = f"cp{PYTHON[0]}{PYTHON[1]}"
    return {*cpython_tags(PYTHON, platforms=platforms, abis=[name]), *compatible_tags(PYTHON, name, platforms)}


def machines_of(package: dict[str, Any]) -> list[str]:
    """Return the machines that a package is needed on."""
    fixed = {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "python_version": "3.13",
        "python_full_version": "3.13.0",
    }
    marker = Marker(package["marker"]) if "marker" in package else None
    return [one for one in MACHINES if marker is None or marker.evaluate({**fixed, "platform_machine": one})]


def hashes_of(package: dict[str, Any], machines: list[str]) -> list[str]:
    """Return the SHA-256 of the files of a package that its machines may install."""
    found: set[str] = set()
    for machine in machines:
        tags = tags_of(machine)
        wheels = [one for one in package.get("wheels", []) if parse_wheel_filename(file_name(one))[3] & tags]
        files = wheels or [package["sdist"]]
        found |= {one["hashes"]["sha256"] for one in files}
    return sorted(found)


def file_name(file: dict[str, Any]) -> str:
    return str(file.get("name") or unquote(file["url"].rsplit("/", 1)[1]))


def write(name: str, packages: list[dict[str, Any]]) -> None:
    """Write a requirements file with hashes, the packages in the order of their names."""
    lines = [f"# Made by `make lock`: CPython {PYTHON[0]}.{PYTHON[1]} on Linux, {' and '.join(MACHINES)}."]
    for package in sorted(packages, key=lambda one: str(canonicalize_name(one["name"]))):
        if machines := machines_of(package):
            only = f' ; platform_machine == "{machines[0]}"' if len(machines) == 1 else ""
            hashes = [f"    --hash=sha256:{one}" for one in hashes_of(package, machines)]
            lines.append(" \\\n".join([f"{package['name']}=={package['version']}{only}", *hashes]))
    (ROOT / "requirements" / name).write_text("\n".join(lines) + "\n")


def main(uv: str, torch_index: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["s3"]
    packages = resolved(uv, [*project["project"]["dependencies"], *extra, *project["build-system"]["requires"]])
    cuda = [one for one in packages if FOR_CUDA.fullmatch(one["name"])]
    write("build.lock", [one for one in packages if one["name"] == "setuptools"])
    write("image.lock", [one for one in packages if one not in cuda])
    write("torch-cuda.lock", cuda)
    version = next(one["version"] for one in cuda if one["name"] == "torch")
    try:
        write("torch-cpu.lock", resolved(uv, [f"torch=={version}+cpu"], "--no-deps", "--index-url", torch_index))
    except subprocess.CalledProcessError:
        present = ROOT / "requirements" / "torch-cpu.lock"
        if not present.exists() or f"torch=={version}+cpu " not in present.read_text():
            sys.exit(
                f"make lock: {torch_index} lists no CPU build of torch {version}, and torch-cpu.lock is of another version"
            )
        print(
            f"make lock: {torch_index} could not be read, torch-cpu.lock stays as it is (torch {version})", file=sys.stderr
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
