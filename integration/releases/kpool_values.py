"""Random k-pooling fills against the code of the installed SGLang, 0.5.20 or later.

    python -m integration.releases.kpool_values [--batches N]

Needs no GPU: Triton's interpreter runs SGLang's kernels, some 40 ms for a batch of each of the three
roles. Writes integration/results/kpool-values.json, or below NSA_RESULTS_DIR; each release is a part.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from integration import result_files

TEST = "tests/adapters/test_kpool_values.py::test_random_batches"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=10_000, help="of each role (default: 10,000)")
    part = run(parser.parse_args().batches)
    command = "python -m integration.releases.kpool_values"
    result_files.merge("kpool-values.json", command, {version("sglang"): part}, alone=True)
    print(f"kpool_values {'passed' if part['passed'] else 'FAILED'}: {part['roles']}")
    return 0 if part["passed"] else 1


def run(batches: int) -> dict[str, Any]:
    """The test with so many batches of each role."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        command += [TEST, "--fuzz-batches", str(batches)]
        pytest = subprocess.run(command, cwd=result_files.ROOT, check=False)
        roles = roles_of(report.read_text()) if report.is_file() else []
    return {
        "passed": pytest.returncode == 0 and len(roles) == 3,
        "seconds": round(time.monotonic() - begin, 1),
        "roles": roles,
    }


def roles_of(report: str) -> list[dict[str, Any]]:
    """What each test recorded, of pytest's report: batches, and by tensor how many values were equal."""
    recorded = []
    for properties in ElementTree.fromstring(report).iter("properties"):
        values = {each.attrib["name"]: each.attrib["value"] for each in properties}
        recorded.append({name: int(text) if text.isdigit() else text for name, text in values.items()})
    return recorded


if __name__ == "__main__":
    raise SystemExit(main())
