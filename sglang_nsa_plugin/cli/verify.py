"""``sglang-nsa-plugin verify``: what is installed, one fill by each implementation, a verdict."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_nsa_plugin import options
from sglang_nsa_plugin.cli import environment, terminal

STDOUT = "-"
KERNELS = {"cuda": "CUDA", "triton": "Triton", "torch": "PyTorch"}
WHERE = {
    "in-graph": "in the draft-extend graph of",
    "eager": "in one launch before each draft-extend step of",
}


def run(json_path: str | None) -> int:
    """Prints the facts, the fills and the verdict; returns 0 when the best kernel would be active."""
    console = terminal.console()
    result = _examine(console)
    if json_path == STDOUT:
        print(json.dumps(result, indent=2))
    else:
        _print(console, result)
        if json_path:
            Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
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
    if not has_gpu(result):
        return (
            f"No GPU to serve with: {result['no_gpu']}. The CPU twin works, and the {adapter} adapter "
            f"fits {release}"
        )
    kernel = "cuda" if asked == options.DEFAULT else asked
    why = "" if asked == options.DEFAULT else f" (asked for by {options.VARIABLE})"
    check = "" if result["sglang"]["tested"] else f", not a tested release: add {options.CHECK_FLAG} 1"
    return f"Active kernel: {KERNELS[kernel]}{why}, {WHERE[adapter]} {release}{check}"


def _print(console: Console, result: dict[str, Any]) -> None:
    terminal.print_facts(console, _facts(result))
    console.print()
    console.print(_fill_table(result))
    console.print()
    terminal.print_verdict(console, result["verdict"], result["works"])


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("sglang-nsa-plugin", _plugin(result)),
        ("Python", f"{result['python']}, {result['executable']}"),
        ("torch", f"{result['torch']}, {_or_none('CUDA', result['cuda'])}"),
        ("GPU", _gpu(result)),
        ("compiled for", _compiled_for(result["gpu_code"])),
        ("TVM FFI", result["tvm_ffi"] or "not installed"),
        ("SGLang", _release(result["sglang"])),
        ("plugin loaded", _loads(result["discovery"])),
        ("backend", _backend(result["setting"])),
        ("adapter", _adapter(result["adapter"])),
    ]


def _plugin(result: dict[str, Any]) -> str:
    """The version; where Python and library lie apart, as in a clone, also both places."""
    package, library = Path(result["package"]), Path(result["library"])
    if package == library.parents[1]:
        return str(result["plugin"])
    return f"{result['plugin']}, Python of {package}, library of {library.parents[1]}"


def _or_none(name: str, value: str | None) -> str:
    return f"{name} {value}" if value else f"no {name}"


def _gpu(result: dict[str, Any]) -> str:
    driver = (
        _or_none("driver", result["driver"]) if result["driver_problem"] is None else "driver unknown"
    )
    named = f"{result['gpu']}, {driver}" if result["gpu"] else "none"
    why = result["no_gpu"] or result["driver_problem"]
    return f"{named}: {why}" if why else named


def _compiled_for(targets: list[str] | None) -> str:
    if targets is None:
        return "unknown: the library cannot be read"
    if not targets:
        return "the CPU alone"
    ptx = [f"PTX for {target}" for target in targets if target.startswith("compute_")]
    return ", ".join([target for target in targets if target.startswith("sm_")] + ptx)


def _release(sglang: dict[str, Any]) -> str:
    if sglang["version"] is None:
        return "not installed"
    tested = "a tested release" if sglang["tested"] else "not a tested release"
    return f"{sglang['version']}, {tested}, in {sglang['path']}"


def _loads(discovery: dict[str, Any]) -> str:
    given = discovery["variable"]
    if discovery["loads"]:
        return f"yes, SGLANG_PLUGINS {f'is {given}' if given else 'is not set'}"
    return f"no, {discovery['problem']}"


def _backend(setting: dict[str, str | None]) -> str:
    if setting["problem"] is not None:
        return setting["problem"]
    return f"{setting['backend']}; a server's {options.FLAG} overrides it"


def _adapter(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return "none: SGLang is not installed"
    if adapter["broken"] is not None:
        return f"none: SGLang is broken: {adapter['broken']}"
    misfits = "; ".join(adapter["misfits"])
    return f"{adapter['name']}, does not fit: {misfits}" if misfits else f"{adapter['name']}, fits"


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
