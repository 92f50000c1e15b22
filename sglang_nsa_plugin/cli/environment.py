"""What ``verify`` reports about a machine, as plain values.

Versions, the GPU, whether SGLang loads the plugin, and whether the adapter fits the installed SGLang.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

from sglang_nsa_plugin import options
from sglang_nsa_plugin.cli.source_stubs import stubbed, why_import_fails
from sglang_nsa_plugin.state import ROLES

NVIDIA_SMI_SECONDS = 5
UNKNOWN_VERSION = "0.0.0.dev0"  # what SGLang calls itself when it cannot find out
# What the source of a broken SGLang can raise when it is read: syntax, encoding, imports, base classes.
BROKEN = (SyntaxError, ValueError, ImportError, OSError, TypeError)
GROUP, NAME = "sglang.srt.plugins", "nsa"
VARIABLE = "SGLANG_PLUGINS"
PACKAGE = Path(__file__).resolve().parents[1]


class Driver(NamedTuple):
    """The driver's version and the first GPU, or why nvidia-smi, which is there, does not tell."""

    version: str | None = None
    gpu: str | None = None
    problem: str | None = None


def machine() -> dict[str, Any]:
    """Versions, where the plugin lies, and the GPU.

    ``no_gpu`` says why torch has no GPU and ``no_gpu_remedy`` what to do. Both are None if it has one.
    ``driver_problem`` is how nvidia-smi fails, or None.
    """
    import torch

    from sglang_nsa_plugin.kernels import library

    driver = _nvidia_smi()
    no_gpu, remedy = _no_gpu(driver)
    return {
        "plugin": version("sglang-nsa-plugin"),
        "package": str(PACKAGE),
        "library": str(library.LIBRARY),
        "gpu_code": gpu_code_of(library.LIBRARY),
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver.version,
        "driver_problem": driver.problem,
        "gpu": driver.gpu if no_gpu else torch.cuda.get_device_name(),
        "no_gpu": no_gpu,
        "no_gpu_remedy": remedy,
        "tvm_ffi": distribution("apache-tvm-ffi"),
    }


def gpu_code_of(library: Path) -> list[str] | None:
    """What the compiled library was compiled for, as in ``["sm_90", "compute_90"]``; compute_90 is PTX.

    None where it cannot be read: the fills say why.
    """
    from sglang_nsa_plugin.kernels import gpu_code

    try:
        return gpu_code.targets(library.read_bytes())
    except (OSError, ValueError):
        return None


def distribution(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> Driver:
    """What nvidia-smi reports; all None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Driver()
    query = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return Driver(problem=f"{tool} does not run: {error.strerror}")
    try:
        printed, _ = process.communicate(timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting: a process that hangs inside the driver does not die
        return Driver(problem=f"{tool} gave no answer in {NVIDIA_SMI_SECONDS} s")
    text = printed.decode(errors="replace").strip()
    if process.returncode != 0:
        said = " ".join(text.split()) or "nothing"
        return Driver(problem=f"{tool} says {said!r} and ends with code {process.returncode}")
    answer = re.match(r"(\d[\d.]*), (.+)", text)
    if answer is None:
        return Driver(problem=f"{tool} names no driver and GPU, but says {text!r}")
    return Driver(answer[1], answer[2].strip())


def _no_gpu(driver: Driver) -> tuple[str | None, str | None]:
    """Why torch has no NVIDIA GPU, and what to do on a machine that has one."""
    import torch

    if torch.version.hip is not None:
        reason = f"torch {torch.__version__} is a ROCm build; the CUDA kernel needs an NVIDIA GPU"
        return reason, "install a torch that is built with CUDA"
    if torch.cuda.is_available():
        return None, None
    if driver.problem is not None:
        reason = f"the NVIDIA driver does not work: {driver.problem}"
        return (
            reason,
            "mend the driver (reboot after an update), or remove nvidia-smi if there is no GPU",
        )
    if not torch.backends.cuda.is_built():
        reason = f"torch {torch.__version__} is built without CUDA"
        return reason, "install a torch that is built with CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver.version is not None and hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides the GPU", "unset CUDA_VISIBLE_DEVICES"
    reason = f"torch {torch.__version__} sees no NVIDIA GPU"
    return reason, f"install a driver that serves CUDA {torch.version.cuda}"


def sglang() -> dict[str, Any]:
    """The SGLang that this Python imports, where it lies, and whether it is a tested release."""
    from sglang_nsa_plugin.adapters import releases

    package = _sglang_package()
    found = None if package is None else _sglang_version(package)
    return {
        "version": found,
        "path": None if package is None else str(package),
        "tested": found is not None and releases.why_untested(found) is None,
        "newest_tested": releases.TESTED[-1],
    }


def _sglang_package() -> Path | None:
    """The folder of the package, installed or a source tree on PYTHONPATH. Nothing of it is imported."""
    spec = importlib.util.find_spec("sglang")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _sglang_version(package: Path) -> str:
    """Looked up as SGLang does: the file that its build writes, then the installed distribution."""
    written = package / "_version.py"
    if written.is_file():
        text = written.read_text(errors="replace")
        literal = re.search(r"^__version__ *=(?: *version *=)? *['\"](.+?)['\"]", text, re.MULTILINE)
        if literal is not None:
            return literal[1]
    return distribution("sglang") or UNKNOWN_VERSION


def adapter_fit() -> dict[str, Any]:
    """The adapter for the installed SGLang, and its ``misfits``: an empty list when it fits.

    Read from SGLang's source; SGLang is not imported. ``broken`` says why the source cannot be read.
    ``roles`` says of each role why the adapter cannot fill it alone, or None.
    """
    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.adapters.install import adapter_for_installed, why_role_misfits

    with stubbed("sglang"):
        try:
            adapter = adapter_for_installed()
            misfits = hooks.misfits(adapter.common.requirements)
            asked = dict.fromkeys((*ROLES, *setting()["roles"]))
            roles = {role: why_role_misfits(adapter, role, _is_named(role)) for role in asked}
            broken = why_import_fails("sglang")
        except BROKEN as error:
            return {"name": None, "misfits": [], "broken": in_words(error), "roles": {}}
    return {"name": adapter.name, "misfits": misfits, "broken": broken, "roles": roles}


def _is_named(role: str) -> bool:
    """Whether the environment asks for this role by name; `setting` says what is wrong with it."""
    return setting()["problem"] is None and options.names_role(object(), role)


def in_words(error: BaseException) -> str:
    """The error in one line, with the file and line of a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    return " ".join(str(error).split()) or type(error).__name__


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


def setting() -> dict[str, Any]:
    """Backend and roles that the environment asks for; ``problem`` if a variable has no valid value."""
    try:
        options.validate_environment()
    except SystemExit as error:
        problem = str(error).removeprefix("sglang-nsa-plugin: ")
        return {"backend": None, "roles": [], "problem": problem}
    asked = object()
    return {
        "backend": options.backend_of(asked),
        "roles": list(options.roles_of(asked)),
        "problem": None,
    }
