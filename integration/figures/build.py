"""Writes docs/results.md and docs/releases.md from the committed result files.

    python -m integration.figures.build [--check]

--check writes nothing. It names each page that is out of date, and the picture that plot.py draws, and exits
with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from integration.figures import releases_page, results_page
from integration.figures.committed import RESULTS, ROOT, shown_case
from integration.releases.install_sglang import release_key

PAGES = {"docs/results.md": results_page.page, "docs/releases.md": releases_page.page}
PICTURE = ROOT / "docs" / "host-time.svg"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args().check
    pages = {ROOT / name: make() for name, make in PAGES.items()}
    if check:
        stale = out_of_date(pages)
        print("\n".join(stale) or "the pages and the picture are up to date")
        return int(bool(stale))
    for path, text in pages.items():
        path.write_text(text)
    return 0


def out_of_date(pages: dict[Path, str]) -> list[str]:
    stale = [
        f"{path.relative_to(ROOT)} is out of date: run python -m integration.figures.build"
        for path, text in pages.items()
        if not path.is_file() or path.read_text() != text
    ]
    if in_picture(PICTURE) != for_picture():
        stale.append("docs/host-time.svg is out of date: run python -m integration.figures.plot")
    return stale


def for_picture() -> dict[str, dict[str, float]]:
    """Release → host microseconds of planning one draft-extend step, SGLang's own and with the plugin."""
    versions = sorted(
        (path.stem.removeprefix("gpu-test-") for path in RESULTS.glob("gpu-test-*.json")),
        key=release_key,
    )
    cases = {version: shown_case(version) for version in versions}
    return {
        version: {name: case["host_us"][name] for name in ("sglang", "ours")}
        for version, case in cases.items()
        if case is not None
    }


def in_picture(picture: Path) -> Any:
    """The figures that a picture shows, as plot.py wrote them into its description."""
    described = ElementTree.parse(picture).find(".//{http://purl.org/dc/elements/1.1/}description")
    return None if described is None else json.loads(described.text or "null")


if __name__ == "__main__":
    raise SystemExit(main())
