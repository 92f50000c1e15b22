"""What ``verify`` found, line by line, and the one thing that mends what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.cli import environment
from sglang_nsa_plugin.cli.terminal import Finding

REBUILD = "in a clone, with nvcc 13: NSA_CUDA=ON pip install --no-deps --force-reinstall ."


def of(result: dict[str, Any]) -> list[Finding]:
    """The findings of a result of ``verify``."""
    return [
        Finding("sglang-nsa-plugin", _plugin(result)),
        Finding("Python", f"{result['python']}, {result['executable']}"),
        Finding("torch", f"{result['torch']}, {_or_none('CUDA', result['cuda'])}"),
        Finding("GPU", _gpu(result), _mend_gpu(result)),
        Finding("compiled for", _compiled_for(result["gpu_code"]), _mend_library(result)),
        Finding("TVM FFI", result["tvm_ffi"] or "not installed", _mend_tvm_ffi(result)),
        Finding("SGLang", _release(result["sglang"]), _mend_sglang(result)),
        Finding("plugin loaded", _loads(result["discovery"]), result["discovery"]["remedy"]),
        Finding("backend", _backend(result["setting"]), _mend_setting(result["setting"])),
        Finding("adapter", _adapter(result["adapter"]), _mend_adapter(result)),
        *_roles(result),
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


def _mend_gpu(result: dict[str, Any]) -> str | None:
    """Where there is not even a driver, nothing is broken: this is no machine to serve with."""
    if result["no_gpu"] is None:
        return None
    is_host = result["driver"] is not None or result["driver_problem"] is not None
    remedy: str = result["no_gpu_remedy"]
    return remedy if is_host else f"run this command where you serve; if that is here, {remedy}"


def _compiled_for(targets: list[str] | None) -> str:
    if targets is None:
        return "unknown: the library cannot be read"
    if not targets:
        return "the CPU alone"
    ptx = [f"PTX for {target}" for target in targets if target.startswith("compute_")]
    return ", ".join([target for target in targets if target.startswith("sm_")] + ptx)


def _mend_library(result: dict[str, Any]) -> str | None:
    return None if result["gpu_code"] else REBUILD


def _mend_tvm_ffi(result: dict[str, Any]) -> str | None:
    from sglang_nsa_plugin.kernels.library import TVM_FFI

    return None if result["tvm_ffi"] else f"pip install '{TVM_FFI}'"


def _release(sglang: dict[str, Any]) -> str:
    if sglang["version"] is None:
        return "not installed"
    tested = "a tested release" if sglang["tested"] else "not a tested release"
    return f"{sglang['version']}, {tested}, in {sglang['path']}"


def _mend_sglang(result: dict[str, Any]) -> str | None:
    sglang = result["sglang"]
    if sglang["version"] is None:
        return f"{result['executable']} -m pip install sglang=={sglang['newest_tested']}"
    return None if sglang["tested"] else f"start servers with {options.CHECK_FLAG} 1, and compare"


def _loads(discovery: dict[str, Any]) -> str:
    given = discovery["variable"]
    if discovery["loads"]:
        return f"yes, {environment.VARIABLE} {f'is {given}' if given else 'is not set'}"
    return f"no, {discovery['problem']}"


def _backend(setting: dict[str, Any]) -> str:
    if setting["problem"] is not None:
        return str(setting["problem"])
    return f"{setting['backend']}; a server's {options.FLAG} overrides it"


def _mend_setting(setting: dict[str, Any]) -> str | None:
    if setting["problem"] is not None:
        return f"unset {setting['problem'].partition(':')[0]}"
    return f"unset {options.VARIABLE}" if setting["backend"] == "off" else None


def _adapter(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return "none: SGLang is not installed"
    if adapter["broken"] is not None:
        return f"none: SGLang is broken: {adapter['broken']}"
    misfits = "; ".join(adapter["misfits"])
    return f"{adapter['name']}, does not fit: {misfits}" if misfits else f"{adapter['name']}, fits"


def _mend_adapter(result: dict[str, Any]) -> str | None:
    adapter = result["adapter"]
    if adapter is not None and adapter["broken"] is None and not adapter["misfits"]:
        return None
    return f"{result['executable']} -m pip install sglang=={result['sglang']['newest_tested']}"


def _roles(result: dict[str, Any]) -> list[Finding]:
    """A line for each role that the environment asks for, where the adapter fits."""
    if _mend_adapter(result) is not None:
        return []
    asked, why_not = result["setting"]["roles"], result["adapter"]["roles"]
    return [Finding(role, *_role(role, why_not[role], result)) for role in asked]


def _role(role: str, why_not: str | None, result: dict[str, Any]) -> tuple[str, str | None]:
    if why_not is None:
        return "fits", None
    naming, newest = options.how_to_name(role), result["sglang"]["newest_tested"]
    remedy = naming if naming in why_not else f"{result['executable']} -m pip install sglang=={newest}"
    return f"SGLang fills it: {why_not}", remedy
