"""Install SGLang so that its Python modules import where there is no GPU.

    python -m integration.releases.install_sglang 0.5.17

installs into the interpreter that runs it: torch (only when none is there), SGLang without its
requirements, the few requirements that importing MODULES needs, and a stand-in for torchvision.
What needs a GPU (kernels, FlashInfer, DeepGEMM) is left out: the result cannot serve a model.
Versions come from the SGLang wheel's own metadata where it names them. A second run finds
everything in place and changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

TORCH = "2.13.0"
# torch for the CPU brings no Triton; with this one the interpreter was tried.
TRITON = "3.6.0"

# What the imports of MODULES load, and prometheus_client, with which SGLang makes metrics. pip follows
# the requirements of these; the version is SGLang's where it names one, else the newest.
REQUIREMENTS = (
    "IPython",
    "aiohttp",
    "apache-tvm-ffi",
    "compressed-tensors",
    "dill",
    "einops",
    "fastapi",
    "gguf",
    "msgspec",
    "numpy",
    "openai",
    "orjson",
    "partial_json_parser",
    "pillow",
    "prometheus_client",
    "psutil",
    "pybase64",
    "pydantic",
    "pyzmq",
    "requests",
    "sentencepiece",
    "setproctitle",
    "tqdm",
    "transformers",
    "uvicorn",
    "xgrammar",
)

# Further requirements of single releases: (first release, last release, requirement).
FURTHER_REQUIREMENTS: tuple[tuple[str, str, str], ...] = ()

LATER = "1000"  # than any release: what holds for 0.5.23 is tried with those that follow

# What has to import in the end: (first release, last release, module).
MODULES = (
    ("0.5.11", "0.5.12.post1", "sglang.srt.layers.attention.nsa_backend"),
    ("0.5.13", LATER, "sglang.srt.layers.attention.dsa_backend"),
    ("0.5.11", LATER, "sglang.srt.server_args"),
    ("0.5.11", LATER, "sglang.srt.plugins"),
    ("0.5.11", LATER, "sglang.srt.plugins.hook_registry"),
    ("0.5.11", LATER, "sglang.srt.speculative.draft_utils"),
    ("0.5.11", LATER, "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner"),
    ("0.5.11", LATER, "sglang.srt.speculative.eagle_worker_v2"),
    ("0.5.11", LATER, "sglang.srt.managers.scheduler"),
    ("0.5.11", LATER, "sglang.srt.model_executor.model_runner"),
)

# Packages that SGLang or transformers import but that cannot be here: no published torchvision
# loads beside the CPU torch, and the kernels need CUDA. (first release, last release, package).
STAND_INS = (
    ("0.5.11", LATER, "torchvision"),
    ("0.5.11", "0.5.12.post1", "sgl_kernel"),
)
STAND_IN_PARTS = {
    "torchvision": (
        "io",
        "ops",
        "ops.boxes",
        "transforms",
        "transforms.functional",
        "transforms.v2",
        "transforms.v2.functional",
    ),
    "sgl_kernel": ("kvcacheio",),
}
STAND_IN_TITLE = "A stand-in put here by integration/releases/install_sglang.py."
STAND_IN = f'''\
"""{STAND_IN_TITLE}

It satisfies imports. Making or calling anything of it raises RuntimeError.
"""

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.0.0"


class InterpolationMode(enum.Enum):
    """torchvision's: transformers maps it to Pillow's while it is imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _refuse(self, *args, **kwargs):
    raise RuntimeError(
        f"{{type(self).__module__}}.{{type(self).__name__}}: this {{__name__}} is a stand-in that "
        "only satisfies imports; install the real package to use it"
    )


class _Part(ModuleType):
    InterpolationMode = InterpolationMode

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {{"__init__": _refuse, "__module__": self.__name__}})


def _add(name):
    part = sys.modules[name] = _Part(name)
    part.__spec__ = ModuleSpec(name, None, is_package=True)
    part.__path__ = []
    parent, _, leaf = name.rpartition(".")
    setattr(sys.modules[parent], leaf, part)


for _name in PARTS:
    _add(f"{{__name__}}.{{_name}}")
'''


def release_key(version: str) -> tuple[int, ...]:
    """'0.5.15.post1' -> (0, 5, 15, 1); '0.5.15' -> (0, 5, 15)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def for_release(table: tuple[tuple[str, str, str], ...], version: str) -> list[str]:
    """The entries of a (first, last, entry) table that hold for this release."""
    key = release_key(version)
    return [what for first, last, what in table if release_key(first) <= key <= release_key(last)]


def normal(name: str) -> str:
    """The spelling under which package names compare equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> str | None:
    """The installed version of a distribution without its local part, or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> None:
    """Run this interpreter's pip, quietly."""
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-qq"], check=True)


def pip_install(*arguments: str) -> None:
    # No bytecode: check_imports writes it for the modules that are loaded, a small part of all.
    pip("install", "--no-compile", *arguments)


def specifiers(requires_dist: list[str]) -> dict[str, str]:
    """'Requires-Dist' lines -> {normal name: version specifier, '' when free}, extras left out."""
    found = {}
    for line in requires_dist:
        requirement, _, marker = line.partition(";")
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?", requirement.strip())
        if match and "extra ==" not in marker:
            found[normal(match[1])] = match[2].replace(" ", "")
    return found


def requirements(version: str, requires_dist: list[str]) -> list[str]:
    """What pip shall install beside SGLang, each with the version that SGLang asks for."""
    pins = specifiers(requires_dist)
    names = (*REQUIREMENTS, *for_release(FURTHER_REQUIREMENTS, version))
    return [f"triton=={TRITON}", *(name + pins.get(normal(name), "") for name in names)]


def is_met(requirement: str) -> bool:
    """Whether a requirement is installed; a range counts as met by any version."""
    name, exactly, pin = requirement.partition("==")
    have = installed(re.split(r"[<>=!~]", name)[0])
    return have == pin if exactly else have is not None


def everything_is_there(version: str) -> bool:
    """Whether torch, this SGLang and its requirements are installed."""
    if installed("torch") is None or installed("sglang") != version:
        return False
    requires_dist = importlib.metadata.requires("sglang") or []
    return all(is_met(requirement) for requirement in requirements(version, requires_dist))


def wheel_requires_dist(wheel: Path) -> list[str]:
    """The 'Requires-Dist' values in a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]


def install(version: str) -> None:
    """torch when there is none, the requirements, then SGLang; torch stays as it was."""
    if installed("torch") is None:
        pip_install(f"torch=={TORCH}")
        importlib.invalidate_caches()
    torch = f"torch=={importlib.metadata.version('torch')}"
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary=:all:", "-d", folder, f"sglang=={version}")
        (wheel,) = Path(folder).glob("sglang-*.whl")
        if installed("sglang") is not None:
            pip("uninstall", "-y", "sglang")
        pip_install(torch, *requirements(version, wheel_requires_dist(wheel)))
        pip_install("--no-deps", str(wheel))


def put_stand_ins(version: str) -> None:
    """Write this release's stand-ins and remove another's; a real package is left alone."""
    wanted = for_release(STAND_INS, version)
    for package, parts in STAND_IN_PARTS.items():
        folder = Path(sysconfig.get_path("purelib")) / package
        module = folder / "__init__.py"
        if module.exists() and STAND_IN_TITLE not in module.read_text():
            continue
        if package in wanted:
            folder.mkdir(exist_ok=True)
            module.write_text(STAND_IN.replace("PARTS", repr(parts)))
        elif folder.exists():
            shutil.rmtree(folder)


def check_imports(version: str) -> None:
    """Import MODULES in a fresh process, which also writes the bytecode of what they load."""
    modules = for_release(MODULES, version)
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", program, *modules]
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit(
            f"SGLang {version}: its modules do not import, see above; add what is missing to "
            "REQUIREMENTS or STAND_IN_PARTS"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", help="an SGLang release, such as 0.5.17")
    version = parser.parse_args().version
    if not for_release(MODULES, version):
        parser.error(f"version: releases from 0.5.11 on are supported, got {version}")
    begin = time.monotonic()
    put_stand_ins(version)
    if everything_is_there(version):
        print(f"SGLang {version} is already installed")
        return
    install(version)
    check_imports(version)
    print(f"SGLang {version} installed and imported in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
