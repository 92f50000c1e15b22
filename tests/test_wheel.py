"""The wheel and the source distribution, built from a clean copy and used without the source.

Building takes the package index, as `pip install .` does, and two minutes on two cores, most of it nvcc.
"""

from __future__ import annotations

import configparser
import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from sglang_nsa_plugin.kernels import gpu_code

ROOT = Path(__file__).resolve().parent.parent
NAME = "sglang_nsa_plugin"
NOT_SOURCE = (
    "*.so",
    ".git",
    ".venv",
    ".releases",
    "build",
    "dist",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
LIBRARY = f"{NAME}/lib/nsa_metadata.so"
MEGABYTES = 5
# A run prints: the wheel's own version, what filled, and the values.
USE = """
import sglang_nsa_plugin, torch
from pathlib import Path
from sglang_nsa_plugin import self_test
args = self_test.small_case(torch.device("cpu"), ragged=False)
bound = sglang_nsa_plugin.fill(args)
print(Path(sglang_nsa_plugin.__file__).parent, bound.backend, args.cache_seqlens.tolist())
"""


def run(*command: object, cwd: Path | None = None, code: int = 0, **variables: str) -> str:
    """Standard output of a command that sees nothing of this source tree."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def pip(*arguments: object, **variables: str) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **variables)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without what was built in it."""
    folder = tmp_path_factory.mktemp("source") / "copy"
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .venv of `make wheel`."""
    return tmp_path_factory.mktemp("make") / "venv"


@pytest.fixture(scope="session")
def made(source: Path, tools: Path) -> Path:
    """What `make wheel` leaves in dist/, from a clean copy but for an older wheel."""
    (source / "dist").mkdir()
    (source / "dist" / f"{NAME}-0.0.1-py3-none-linux_x86_64.whl").touch()
    run("make", "wheel", f"VENV={tools}", cwd=source, MAKEFLAGS="")
    return source / "dist"


@pytest.fixture(scope="session")
def wheel(made: Path) -> Path:
    (path,) = made.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(made: Path) -> Path:
    (path,) = made.glob("*.tar.gz")
    return path


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode())


def members(wheel: Path) -> set[str]:
    """The files of a wheel. auditwheel also lists the folders."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def read(wheel: Path, ending: str) -> str:
    (name,) = [name for name in members(wheel) if name.endswith(ending)]
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


# What is in it


def test_files_of_the_wheel(wheel: Path, source: Path) -> None:
    modules = {str(path.relative_to(source)) for path in (source / NAME).rglob("*.py")}
    info = f"{NAME}-{version()}.dist-info"
    described = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert members(wheel) == modules | {LIBRARY} | {f"{info}/{name}" for name in described}


def targets(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return gpu_code.targets(archive.read(LIBRARY))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which compiles the CUDA kernel")
def test_the_library_has_code_for_the_gpus_that_the_readme_names(wheel: Path) -> None:
    assert targets(wheel) == ["sm_90", "sm_100", "sm_103", "sm_120", "compute_90"]
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    # ptxas leaves its options in each piece of machine code
    compiled_for = {found.decode() for found in re.findall(rb"-arch (sm_\d+)", library)}
    assert compiled_for == {"sm_90", "sm_100", "sm_103", "sm_120"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "machine code for sm_90, sm_100, sm_103 and sm_120" in readme


def test_size_of_the_wheel(wheel: Path) -> None:
    assert wheel.stat().st_size < MEGABYTES * 2**20


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    pattern = rf"{NAME}-{re.escape(version())}-py3-none-manylinux_2_\d+_(x86_64|aarch64)\.whl"
    assert re.fullmatch(pattern, wheel.name)


def test_the_tag_of_the_wheel_is_the_lowest_that_its_library_fulfils(wheel: Path, tools: Path) -> None:
    """PyPI refuses `linux_x86_64`, which the build itself writes."""
    said = " ".join(run(tools / "bin/auditwheel", "show", wheel).split())
    constrains = re.search(r'This constrains the platform tag to "(manylinux_\w+)"', said)
    assert constrains is not None
    tags = re.findall(r"^Tag: py3-none-(\S+)$", read(wheel, "dist-info/WHEEL"), re.MULTILINE)
    assert tags == [constrains[1]]
    assert wheel.stem.endswith(f"-{constrains[1]}")


def test_pip_refuses_the_wheel_where_its_c_library_is_too_new(wheel: Path, tmp_path: Path) -> None:
    processor = re.search(r"manylinux_2_\d+_(\w+)\.whl", wheel.name)
    assert processor is not None
    older = ("--platform", f"manylinux2010_{processor[1]}", "--only-binary=:all:", "--no-deps")
    command = (sys.executable, "-m", "pip", "install", *older, "--target", tmp_path, wheel)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert f"{wheel.name} is not a supported wheel on this platform" in done.stderr


def test_auditwheel_leaves_the_library_as_it_was_built(wheel: Path, source: Path) -> None:
    """Same bytes: libtvm_ffi.so is neither bundled nor found by another path than TVM FFI's own."""
    built = only((source / "build" / "wheel").glob("*.whl"))
    assert built.name.endswith(("-linux_x86_64.whl", "-linux_aarch64.whl"))
    assert members(wheel) == members(built)
    with zipfile.ZipFile(wheel) as repaired, zipfile.ZipFile(built) as original:
        assert repaired.read(LIBRARY) == original.read(LIBRARY)


def test_the_library_names_no_folder(wheel: Path, tools: Path, tmp_path: Path) -> None:
    """Neither where other libraries lie (RPATH) nor where it was built."""
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract(LIBRARY, tmp_path))
    patchelf = tools / "bin/patchelf"
    assert run(patchelf, "--print-rpath", library).strip() == ""
    assert "libtvm_ffi.so" in run(patchelf, "--print-needed", library).split()
    assert re.findall(rb"/(?:tmp|home|root|build)/[ -~]+", library.read_bytes()) == []


def test_entry_points_of_the_wheel(wheel: Path) -> None:
    groups = configparser.ConfigParser()
    groups.read_string(read(wheel, "entry_points.txt"))
    assert {name: dict(groups[name]) for name in groups.sections()} == {
        "sglang.srt.plugins": {"nsa": "sglang_nsa_plugin.plugin:register"},
        "console_scripts": {"sglang-nsa-plugin": "sglang_nsa_plugin.cli.main:main"},
    }


def test_requirements_leave_the_hosts_packages_alone(wheel: Path) -> None:
    """A plugin that asked for torch, Triton or SGLang could move the ones that serve."""
    required = [text for text in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in text]
    names = {re.match(r"[\w.-]+", text)[0] for text in required}  # type: ignore[index]
    assert names == {"apache-tvm-ffi", "rich"}


def version() -> str:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    return project[1]


def test_versions_agree(wheel: Path, venv: Path) -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    program = "import sglang_nsa_plugin; print(sglang_nsa_plugin.__version__)"
    installed = run(venv / "bin/python", "-c", program, cwd=venv).strip()
    assert newest is not None
    assert metadata(wheel)["Version"] == installed == newest[1] == version()


# Using it


@pytest.fixture(scope="session")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the torch of this environment: torch is the host's and large."""
    folder = tmp_path_factory.mktemp("lent")
    for package in with_requirements("torch", {"numpy"}):
        for file in {file.parts[0] for file in importlib.metadata.files(package) or ()} - {".."}:
            target = importlib.metadata.distribution(package).locate_file(file)
            if not (folder / file).exists():
                (folder / file).symlink_to(target)
    return folder


def make_venv(folder: Path, lent: Path) -> Path:
    """A virtual environment that sees what is lent, and nothing else of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(f"{lent}\n")
    return folder


@pytest.fixture(scope="session")
def venv(wheel: Path, lent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what the wheel requires."""
    folder = make_venv(tmp_path_factory.mktemp("venv"), lent)
    pip("--python", folder / "bin/python", "install", "--quiet", wheel)
    return folder


def with_requirements(package: str, known: set[str]) -> set[str]:
    """A package and all that it requires, as far as it is installed."""
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return known
    known = known | {package}
    for text in required:
        name = re.match(r"[\w.-]+", text)[0]  # type: ignore[index]
        if "extra ==" not in text and name not in known:
            known = with_requirements(name, known)
    return known


def test_a_fill_without_source_and_compiler(venv: Path, tmp_path: Path) -> None:
    printed = run(venv / "bin/python", "-c", USE, cwd=tmp_path, PATH=str(venv / "bin"))
    package, backend, lengths = printed.split(maxsplit=2)
    assert Path(package).is_relative_to(venv)
    assert backend == "cpu"
    assert lengths.strip() == "[1, 37, 0, 90]"


def test_the_command_without_source_and_compiler(venv: Path, tmp_path: Path) -> None:
    command = venv / "bin/sglang-nsa-plugin"
    assert run(command, "--version", cwd=tmp_path, PATH=str(venv / "bin")).strip() == version()


def test_verify_without_source_and_compiler(venv: Path, wheel: Path, tmp_path: Path) -> None:
    """It fills with what the wheel brings, and says that SGLang is not there."""
    command = (venv / "bin/sglang-nsa-plugin", "verify", "--json")
    result = json.loads(run(*command, cwd=tmp_path, code=1, PATH=str(venv / "bin")))
    assert result["plugin"] == version()
    assert result["discovery"]["plugins"] == ["nsa"]
    assert result["implementations"]["cpu"]["reason"] is None
    assert result["implementations"]["cpu"]["us"] > 0
    assert result["gpu_code"] == targets(wheel)
    assert result["verdict"].startswith(
        f"Not active: {venv / 'bin/python'} finds no SGLang: pip install sglang=="
    )


def test_sglang_is_not_lent(venv: Path, tmp_path: Path) -> None:
    """Else the tests above would not show that the package works without it."""
    program = "from importlib.util import find_spec as f; print(f('sglang'), f('torch') is not None)"
    assert run(venv / "bin/python", "-c", program, cwd=tmp_path).split() == ["None", "True"]


# Three ways to install, and a process that runs inside the clone


def test_python_of_the_clone_uses_the_installed_library(venv: Path, source: Path) -> None:
    """As a server that is started there: the wheel was built from the same sources."""
    package, library, backend = used(venv, source)
    assert package == source / NAME
    assert library == only(venv.glob(f"lib/python*/site-packages/{LIBRARY}"))
    assert backend == "cpu"


def test_a_clone_that_has_changed_refuses_the_installed_library(
    venv: Path, source: Path, tmp_path: Path
) -> None:
    clone = shutil.copytree(source, tmp_path / "clone", ignore=shutil.ignore_patterns("build", "dist"))
    with (clone / "csrc" / "fill.h").open("a") as file:
        file.write("// changed\n")
    refused = run(venv / "bin/python", "-c", REFUSED, cwd=clone)
    assert f"{clone / 'csrc'} is version " in refused
    assert refused.strip().endswith(f"run `pip install .` in {clone}")


def test_an_editable_install_uses_the_library_that_it_built(
    lent: Path, source: Path, tmp_path: Path
) -> None:
    clone = shutil.copytree(source, tmp_path / "clone", ignore=shutil.ignore_patterns("build", "dist"))
    venv = make_venv(tmp_path / "venv", lent)
    pip("--python", venv / "bin/python", "install", "--quiet", "--editable", clone, NSA_CUDA="OFF")
    installed = only(venv.glob(f"lib/python*/site-packages/{LIBRARY}"))
    for folder in (clone, tmp_path):
        assert used(venv, folder) == (clone / NAME, installed, "cpu")


def test_an_install_into_a_folder_uses_its_library(
    lent: Path, wheel: Path, source: Path, tmp_path: Path
) -> None:
    venv = make_venv(tmp_path / "venv", lent)
    target = tmp_path / "target"
    pip("--python", venv / "bin/python", "install", "--quiet", "--target", target, wheel)
    installed = target / NAME / "lib" / "nsa_metadata.so"
    assert used(venv, tmp_path, PYTHONPATH=str(target)) == (target / NAME, installed, "cpu")
    assert used(venv, source, PYTHONPATH=str(target)) == (source / NAME, installed, "cpu")


USED = """
import sglang_nsa_plugin, torch
from pathlib import Path
from sglang_nsa_plugin import self_test
from sglang_nsa_plugin.kernels import library
bound = sglang_nsa_plugin.fill(self_test.small_case(torch.device("cpu"), ragged=False))
print(Path(sglang_nsa_plugin.__file__).parent, library.LIBRARY, bound.backend)
"""
REFUSED = """
import torch
from sglang_nsa_plugin import dispatch
print(dispatch.choose("auto", torch.device("cpu")).refused["cpu"])
"""


def used(venv: Path, folder: Path, **variables: str) -> tuple[Path, Path, str]:
    """The package, the library and the implementation of a process that is started in a folder."""
    package, library, backend = run(venv / "bin/python", "-c", USED, cwd=folder, **variables).split()
    return Path(package), Path(library), backend


def only(paths: Iterable[Path]) -> Path:
    (path,) = paths
    return path


# The source distribution, and the wheel without it


def test_files_of_the_source_distribution(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    built_from = {"pyproject.toml", "LICENSE", "README.md", "csrc/CMakeLists.txt", "csrc/fill_static.cu"}
    assert built_from <= files
    assert {name for name in files if name.endswith((".so", ".whl", ".pyc"))} == set()
    assert {name for name in files if name.startswith((".ci", ".github"))} == set()


def test_the_same_source_makes_the_same_bytes(source: Path, wheel: Path, tmp_path: Path) -> None:
    """As `pip install .` builds them, in another folder. `make wheel` used the source distribution."""
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source)
    (from_source,) = tmp_path.iterdir()
    assert members(from_source) == members(wheel)
    with zipfile.ZipFile(from_source) as archive, zipfile.ZipFile(wheel) as of_make:
        changed = [name for name in sorted(members(wheel)) if archive.read(name) != of_make.read(name)]
        dates = {info.date_time for info in of_make.infolist()}
    assert [Path(name).name for name in changed] == ["RECORD", "WHEEL"]  # they hold the tag
    assert dates == {(2020, 1, 1, 0, 0, 0)}
    assert metadata(from_source).items() == metadata(wheel).items()
