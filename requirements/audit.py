"""Hold the pinned packages against the advisories of PyPI: `make audit`.

Exit 1 when a pinned version has an advisory, 2 when packages could not be audited: their service cannot be reached, or knows
nothing of them. pip-audit, called as the first argument, counts the latter as success.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(pip_audit: str, requirements: str = str(ROOT / "constraints.txt")) -> None:
    options = ["--progress-spinner", "off", "--disable-pip", "--no-deps", "--format", "json"]
    done = subprocess.run([pip_audit, *options, "-r", requirements], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"make audit: nothing was audited, as pip-audit ended with status {done.returncode} ({last})", file=sys.stderr)
        sys.exit(2)
    advised = [one for one in packages if one.get("vulns")]
    for one in advised:
        for advisory in one["vulns"]:
            fixed = (
                f"mended in {', '.join(advisory['fix_versions'])}"
                if advisory["fix_versions"]
                else "not mended in any version"
            )
            print(f"{one['name']} {one['version']}: {advisory['id']}, {fixed}")
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    print(f"{len(packages) - len(skipped)} of {len(packages)} pinned packages audited, {len(advised)} with advisories")
    if skipped:
        what = ", ".join(skipped[:8]) + (" ..." if len(skipped) > 8 else "")
        print(
            f"make audit: {len(skipped)} packages were not audited, as the service knows nothing of them: {what}",
            file=sys.stderr,
        )
    sys.exit(1 if advised else 2 if skipped else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
