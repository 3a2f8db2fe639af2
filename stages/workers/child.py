"""Start a module of this project in a process of its own that runs the same code as this one.

`python -m` would put the current folder first on the path: a `stages.py` or `safetensors.py` that lies there would be run,
and two checkouts would mix. This file is started by its path instead, takes the path of the process that starts it, and
takes our packages from the folder it lies in. An error that nobody foresaw is a sentence here too.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, util
from pathlib import Path

PACKAGES = ("dpar_core", "stages", "pipeline")


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that calls `main()` of a module in a new process."""
    paths = (path or os.getcwd() for path in sys.path)
    return [sys.executable, "-P", __file__, "\n".join(paths), module, *arguments]


def pin(folder: Path) -> None:
    """Import our packages from `folder`, whatever else of these names is on the path.

    Raises ImportError where one is there already from somewhere else.
    """
    for name in PACKAGES:
        init = folder / name / "__init__.py"
        if name in sys.modules:
            found = getattr(sys.modules[name], "__file__", None)
            if found is None or Path(found).resolve() != init.resolve():
                raise ImportError(f"{name} is imported from {found}, expected {init}: take the former from PYTHONPATH")
        elif init.exists():
            spec = util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
            assert spec is not None and spec.loader is not None
            sys.modules[name] = util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def main() -> None:
    """Do what `command` asks for."""
    _, paths, module, *arguments = sys.argv
    sys.path[:] = paths.split("\n")
    sys.argv[:] = [module, *arguments]
    pin(Path(__file__).resolve().parents[2])
    from stages.crash import crash_sentence, disk_sentence, plain_warnings
    from stages.terminal import note

    plain_warnings()
    try:
        import_module(module).main()
    except KeyboardInterrupt:
        sys.exit(130)  # the process that started this one reports it
    except Exception as error:
        if os.environ.get("DPAR_DEBUG") == "1":
            raise
        said = disk_sentence(error)
        note(said or crash_sentence(error, doing=f"the process of {module}"))
        sys.exit(1 if said else 70)


if __name__ == "__main__":
    main()
