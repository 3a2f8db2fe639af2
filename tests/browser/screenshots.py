"""Pictures of the report for the docs and for looking at it: `python -m tests.browser.screenshots [--all FOLDER]`.

Reads artifacts/report/index.html (made by `dpar-cli run`); writes docs/report.png, or with --all FOLDER the whole page at
390, 1024 and 1440 pixels, light and dark, and as it is printed.
"""

import argparse
import tempfile
from pathlib import Path

from tests.browser.chromium import Browser


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("artifacts/report/index.html"))
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    page = options.report.resolve(strict=True)
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        if options.all is None:
            browser.show(page, width=1180, height=1010)
            browser.picture(Path("docs/report.png"))
            return
        options.all.mkdir(parents=True, exist_ok=True)
        for width in (390, 1024, 1440):
            for dark in (False, True):
                browser.show(page, width=width, dark=dark)
                browser.picture(options.all / f"{width}-{'dark' if dark else 'light'}.png", whole=True)
        browser.printed(options.all / "printed.pdf")


if __name__ == "__main__":
    main()
