"""Which counts ``python -m integration.releases.kpool_values`` keeps of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from integration.releases import kpool_values

RECORDS = """
import pytest

@pytest.mark.parametrize("role", ["verify", "draft-extend"])
def test_random_batches(role, record_property):
    record_property("role", role)
    record_property("batches", 40)
"""


def test_what_pytest_recorded(tmp_path: Path) -> None:
    test, report = tmp_path / "test_it.py", tmp_path / "report.xml"
    test.write_text(RECORDS)
    options = ("-q", "-o", "junit_family=xunit1", f"--junitxml={report}")
    subprocess.run([sys.executable, "-m", "pytest", *options, test], cwd=tmp_path, check=True)
    assert kpool_values.roles_of(report.read_text()) == [
        {"role": "verify", "batches": 40},
        {"role": "draft-extend", "batches": 40},
    ]
