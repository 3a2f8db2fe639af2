"""The share of lines that tests reached, one figure per package: `python -m tests.helpers.coverage FILE`."""

import json
import sys
from collections import Counter
from pathlib import Path


def shares(found: dict) -> dict[str, float]:
    """Return the share of reached lines by package. found: the content of a file that pytest-cov wrote as JSON."""
    reached, lines = Counter(), Counter()
    for name, one in found["files"].items():
        package = Path(name).parts[0]
        reached[package] += len(one["executed_lines"])
        lines[package] += len(one["executed_lines"]) + len(one["missing_lines"])
    return {package: reached[package] / count for package, count in sorted(lines.items())}


if __name__ == "__main__":
    words = ", ".join(
        f"{name} {share:.1%}" for name, share in shares(json.loads(Path(sys.argv[1]).read_text("utf-8"))).items()
    )
    print(f"lines reached by the tests' own processes: {words} (with what they start: make coverage)")
