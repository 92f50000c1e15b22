"""``sglang-nsa-plugin verify``: what is installed, one fill by each implementation, a verdict."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_nsa_plugin import options
from sglang_nsa_plugin.cli import environment, files, findings, terminal

STDOUT = "-"
KERNELS = {"cuda": "CUDA", "triton": "Triton", "torch": "PyTorch"}
WHERE = {
    "in-graph": "in the CUDA graphs of",
    "eager": "launched from Python before each draft-extend step of",
}


def run(json_path: str | None) -> int:
    """Prints the facts, the fills and the verdict; returns 0 when the best kernel would be active."""
    console = terminal.console()
    if json_path == STDOUT:
        result = _examine(console)
        print(json.dumps(result, indent=2))
    else:
        files.raise_if_unwritable(json_path)
        result = _examine(console)
        files.write_and_show(result, json_path, lambda: _print(console, result))
    return 0 if result["works"] else 1


def _examine(console: Console) -> dict[str, Any]:
    begin = time.monotonic()
    with terminal.progress(console) as progress:
        task = progress.add_task("reading versions", total=None)
        from sglang_nsa_plugin.cli import one_fill  # imports torch, which takes seconds

        machine, sglang = environment.machine(), environment.sglang()
        adapter = environment.adapter_fit() if sglang["version"] is not None else None
        progress.update(task, description="filling", total=len(one_fill.NAMES))
        implementations = {}
        for name in one_fill.NAMES:
            implementations[name] = one_fill.run(name, machine["no_gpu"])
            progress.advance(task)
    result = {
        **machine,
        "sglang": sglang,
        "discovery": environment.discovery(),
        "setting": environment.setting(),
        "adapter": adapter,
        "implementations": implementations,
        "seconds": round(time.monotonic() - begin, 1),
    }
    problem = why_not_active(result)
    return {**result, "works": problem is None, "verdict": problem or success(result)}


def why_not_active(result: dict[str, Any]) -> str | None:
    """Why the best kernel of this machine would not be active and what to do about it, or None."""
    sglang, discovery, adapter = result["sglang"], result["discovery"], result["adapter"]
    if sglang["version"] is None:
        return (
            f"Not active: {result['executable']} finds no SGLang: pip install "
            f"sglang=={sglang['newest_tested']} into this Python, or put a source tree on PYTHONPATH"
        )
    if not discovery["loads"]:
        return f"Not active: {discovery['problem']}: {discovery['remedy']}"
    if result["setting"]["problem"] is not None:
        return f"Not active: {result['setting']['problem']}"
    if result["setting"]["backend"] == "off":
        return f"Not active: {options.VARIABLE} is off: unset it"
    if adapter["broken"] is not None:
        return (
            f"Not active: the SGLang in {sglang['path']} is broken ({adapter['broken']}): install a "
            f"tested release, such as {sglang['newest_tested']}"
        )
    if adapter["misfits"]:
        return (
            f"Not active: SGLang {sglang['version']} does not fit the {adapter['name']} adapter "
            f"({'; '.join(adapter['misfits'])}): use a tested release, such as "
            f"{sglang['newest_tested']}, or a newer sglang-nsa-plugin"
        )
    return _why_not_best(result)


def _why_not_best(result: dict[str, Any]) -> str | None:
    if result["no_gpu"] is not None and result["driver_problem"] is not None:
        return f"Not active: {result['no_gpu']}: {result['no_gpu_remedy']}"
    best = "cuda" if has_gpu(result) else "cpu"
    reasons = {name: outcome["reason"] for name, outcome in result["implementations"].items()}
    if reasons[best] is None:
        if best == "cpu" and result["gpu_code"] == []:
            return f"Not active: the library is built for the CPU alone. Build it {findings.REBUILD}"
        asked = result["setting"]["backend"]
        why_not = reasons.get(asked)
        return f"Not active: {options.VARIABLE} asks for {asked}: {why_not}" if why_not else None
    if reasons[best] == result["no_gpu"]:
        return f"Not active: {result['no_gpu']}: {result['no_gpu_remedy']}"
    runs = [name for name in KERNELS if reasons[name] is None]
    if result["no_gpu"] is not None or not runs:
        return f"Not active: {reasons[best]}"
    return f"Active kernel: {KERNELS[runs[0]]}, not CUDA: {reasons[best]}"


def has_gpu(result: dict[str, Any]) -> bool:
    """Whether the machine has an NVIDIA GPU, even one that torch does not see."""
    return result["no_gpu"] is None or result["driver"] is not None


def success(result: dict[str, Any]) -> str:
    """The verdict when the best kernel would be active."""
    release = f"SGLang {result['sglang']['version']}"
    adapter, asked = result["adapter"]["name"], result["setting"]["backend"]
    left = [role for role in result["setting"]["roles"] if result["adapter"]["roles"][role] is not None]
    but = f"; SGLang fills {' and '.join(left)} itself" if left else ""
    if not has_gpu(result):
        return (
            f"No GPU to serve with: {result['no_gpu']}. The CPU twin works, and the {adapter} adapter "
            f"fits {release}{but}"
        )
    kernel = "cuda" if asked == options.DEFAULT else asked
    why = "" if asked == options.DEFAULT else f" (asked for by {options.VARIABLE})"
    check = "" if result["sglang"]["tested"] else f", not a tested release: add {options.CHECK_FLAG} 1"
    return f"Active kernel: {KERNELS[kernel]}{why}, {WHERE[adapter]} {release}{but}{check}"


def _print(console: Console, result: dict[str, Any]) -> None:
    terminal.print_findings(console, findings.of(result))
    console.print()
    console.print(_fill_table(result))
    console.print()
    terminal.print_verdict(console, result["verdict"], result["works"])


def _fill_table(result: dict[str, Any]) -> Table:
    from sglang_nsa_plugin.cli import one_fill

    table = Table(
        title=f"one fill: {one_fill.REQUESTS} requests of up to {one_fill.CONTEXT:,} tokens",
        title_justify="left",
    )
    for column in ("kernel", "on", "compared with torch"):
        table.add_column(column)
    table.add_column("µs", justify="right")
    for outcome in result["implementations"].values():
        us = "-" if outcome["us"] is None else f"{outcome['us']:,.1f}"
        compared = "equal" if outcome["reason"] is None else f"cannot run: {outcome['reason']}"
        table.add_row(outcome["name"], outcome["on"], compared, us)
    return table
