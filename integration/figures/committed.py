"""The committed result files, and where their figures come from."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "integration" / "results"
SHOWN_RELEASE = "0.5.17"  # the release on which everything is measured
SHOWN_GPU = "H200"
SHOWN_CASE = {"decode_impl": "flashmla_sparse", "requests": 8, "length": 32_768}
WIDTH = 112


@functools.cache
def load(name: str) -> dict[str, Any]:
    """A result file; one without parts where there is none."""
    path = RESULTS / name
    return dict(json.loads(path.read_text())) if path.is_file() else {"parts": {}}


def host_us_of_a_step(serve: dict[str, Any]) -> dict[str, float] | None:
    """By server, the median host times of all roles added up; None where a run did not take them."""
    by_role = serve.get("host_time", {}).get("median_us_by_role")
    return by_role and {server: sum(us.values()) for server, us in by_role.items()}


def parts(name: str) -> dict[str, Any]:
    return dict(load(name)["parts"])


def shown_case(version: str) -> dict[str, Any] | None:
    """The timed case that stands for a release; None where it was not timed."""
    timed = parts(f"bench-h200-{version}.json") or parts(f"gpu-test-{version}.json")
    cases = timed.get("bench", {}).get("cases", [])
    whole = (case for case in cases if "ours" in case["host_us"])  # the others time kernels alone
    return next((case for case in whole if SHOWN_CASE.items() <= case.items()), None)


def parts_by_gpus(run: dict[str, Any]) -> dict[str, list[str]]:
    """The parts of a result file by the GPU and driver on which they ran."""
    found: dict[str, list[str]] = {}
    for name, part in run["parts"].items():
        for gpu in dict.fromkeys(part.get("of", run)["gpus"]):
            found.setdefault(gpu, []).append(name)
    return found


def gpu_name(gpu: str) -> str:
    """'NVIDIA H200, 580.1' → 'NVIDIA H200, driver 580.1'."""
    return gpu.replace(", ", ", driver ")


def commits(run: dict[str, Any]) -> str:
    """The commits on which the parts of a result file ran."""
    return ", ".join(sorted({of["commit"][:7] for of in _runs(run)}))


def dates(run: dict[str, Any]) -> str:
    """The days on which the parts of a result file ran."""
    return " and ".join(sorted({of["date"][:10] for of in _runs(run)}))


def _runs(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What says when and where each part of a result file ran."""
    for part in file["parts"].values():
        yield part.get("of", file) if isinstance(part, dict) else file


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|---" * len(heading) + "|"
    return "\n".join([_line(heading), rule, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
