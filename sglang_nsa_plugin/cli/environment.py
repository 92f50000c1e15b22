"""What ``verify`` reports about a machine, as plain values.

Versions, the GPU, whether SGLang loads the plugin, and whether the adapter fits the installed SGLang.
"""

from __future__ import annotations

import difflib
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.cli.source_stubs import stubbed

GROUP, NAME = "sglang.srt.plugins", "nsa"
VARIABLE = "SGLANG_PLUGINS"


def machine() -> dict[str, Any]:
    """Versions and the GPU.

    ``no_gpu`` says why torch has no GPU and ``no_gpu_remedy`` what to do. Both are None if it has one.
    """
    import torch

    driver, name = _nvidia_smi()
    no_gpu, remedy = _no_gpu(driver)
    return {
        "plugin": version("sglang-nsa-plugin"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "gpu": name if no_gpu else torch.cuda.get_device_name(),
        "no_gpu": no_gpu,
        "no_gpu_remedy": remedy,
        "tvm_ffi": distribution("apache-tvm-ffi"),
    }


def distribution(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> tuple[str | None, str | None]:
    """The driver's version and the first GPU's name, as nvidia-smi reports them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, None
    query = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None, None
    driver, _, name = done.stdout.partition("\n")[0].partition(", ")
    return driver or None, name or None


def _no_gpu(driver: str | None) -> tuple[str | None, str | None]:
    """Why torch has no NVIDIA GPU, and what to do on a machine that has one."""
    import torch

    if torch.version.hip is not None:
        reason = f"torch {torch.__version__} is a ROCm build; the CUDA kernel needs an NVIDIA GPU"
        return reason, "install a torch that is built with CUDA"
    if torch.cuda.is_available():
        return None, None
    if not torch.backends.cuda.is_built():
        reason = f"torch {torch.__version__} is built without CUDA"
        return reason, "install a torch that is built with CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides the GPU", "unset CUDA_VISIBLE_DEVICES"
    reason = f"torch {torch.__version__} sees no NVIDIA GPU"
    return reason, f"install a driver that serves CUDA {torch.version.cuda}"


def sglang() -> dict[str, Any]:
    """The installed release and whether it is a tested one."""
    from sglang_nsa_plugin.adapters import releases

    installed = distribution("sglang")
    tested = installed is not None and releases.why_untested(installed) is None
    return {"version": installed, "tested": tested, "newest_tested": releases.TESTED[-1]}


def adapter_fit() -> dict[str, Any]:
    """The adapter for the installed SGLang, and its ``misfits``: an empty list when it fits.

    Read from SGLang's source; SGLang is not imported.
    """
    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.adapters.install import adapter_for_installed

    with stubbed("sglang"):
        adapter = adapter_for_installed()
        return {"name": adapter.name, "misfits": hooks.misfits(adapter.requirements)}


def discovery() -> dict[str, Any]:
    """Whether SGLang's ``load_plugins()`` loads the plugin: the entry point and SGLANG_PLUGINS decide.

    ``problem`` says why it does not and ``remedy`` what to do; both are None when it does.
    """
    installed = {point.name: point.value for point in entry_points(group=GROUP)}
    given = os.environ.get(VARIABLE)
    problem = remedy = None
    if not installed.get(NAME, "").startswith("sglang_nsa_plugin."):
        problem = f"the entry point {NAME} of group {GROUP} is not installed"
        remedy = "install the plugin with pip into this Python"
    elif given and NAME not in _names(given):
        problem = f"{VARIABLE} is {given!r}, which {_why_not_selected(_names(given), set(installed))}"
        remedy = f"set {VARIABLE}={','.join([*_installed_names(given, installed), NAME])} or unset it"
    return {
        "plugins": sorted(installed),
        "variable": given,
        "loads": problem is None,
        "problem": problem,
        "remedy": remedy,
    }


def _names(given: str) -> list[str]:
    """The plugins that SGLANG_PLUGINS selects, split as SGLang splits it."""
    return [name.strip() for name in given.split(",") if name.strip()]


def _installed_names(given: str, installed: dict[str, str]) -> list[str]:
    return [name for name in _names(given) if name in installed]


def _why_not_selected(names: list[str], installed: set[str]) -> str:
    unknown = [name for name in names if name not in installed]
    if difflib.get_close_matches(NAME, [name.lower() for name in unknown]):
        return f"misspells {NAME}"
    if unknown:
        return f"names {', '.join(unknown)}, which is not installed, and not {NAME}"
    return f"does not name {NAME}"


def setting() -> dict[str, str | None]:
    """The backend that the environment asks for; ``problem`` when a variable has no valid value."""
    try:
        options.validate_environment()
    except SystemExit as error:
        return {"backend": None, "problem": str(error).removeprefix("sglang-nsa-plugin: ")}
    return {"backend": options.backend_of(object()), "problem": None}
