"""``sglang-nsa-plugin verify``: its text, exit code, JSON, and how long it takes."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import SGLANG, command, needs_sglang, program
from conftest import HAS_GPU

from sglang_nsa_plugin.adapters import releases
from sglang_nsa_plugin.cli import environment, findings, verify
from sglang_nsa_plugin.kernels import library

OTHER_PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
    "entry_points.txt": "[sglang.srt.plugins]\nother = other:register\n",
}


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on standard output, after checking that the exit code agrees with it."""
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if result["works"] else 1)
    return result


class Run(NamedTuple):
    """One run of the command: its text, its JSON, its exit code and how long it took."""

    text: str
    result: dict[str, Any]
    code: int
    seconds: float


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("verify") / "verify.json"
    begin = time.monotonic()
    done = command("verify", "--json", str(path), COLUMNS="80")
    seconds = time.monotonic() - begin
    assert done.stderr == ""
    return Run(done.stdout, json.loads(path.read_text()), done.returncode, seconds)


@needs_sglang
def test_the_verdict_of_this_machine(plain):
    is_cpu_build = plain.result["gpu_code"] == []
    assert plain.code == int(is_cpu_build)
    assert plain.seconds < 20
    verdict = " ".join(plain.text.split("\n\n")[-1].split())
    assert verdict == plain.result["verdict"]
    if is_cpu_build:
        assert verdict.startswith("Not active: ")
    elif HAS_GPU:
        assert verdict.startswith("Active kernel: CUDA, in ")
        assert verdict.endswith(f"of SGLang {SGLANG}")
    else:
        assert verdict.startswith("No GPU to serve with: torch ")
        assert verdict.endswith(f"adapter fits SGLang {SGLANG}")


@needs_sglang
def test_the_text_and_the_json_agree(plain):
    result = plain.result
    for key in ("plugin", "python", "torch", "tvm_ffi"):
        assert result[key] in plain.text
    assert result["sglang"] == {
        "version": SGLANG,
        "path": str(sglang_package()),
        "tested": True,
        "newest_tested": releases.TESTED[-1],
    }
    for path in (result["executable"], result["sglang"]["path"]):
        assert path in "".join(line.strip() for line in plain.text.splitlines())
    assert f"{SGLANG}, a tested release" in plain.text
    assert result["adapter"]["name"] in ("in-graph", "eager")
    assert f"{result['adapter']['name']}, fits" in plain.text
    assert result["adapter"]["misfits"] == []
    assert result["discovery"]["plugins"] == ["nsa"]
    assert "yes, SGLANG_PLUGINS is not set" in plain.text


@needs_sglang
def test_each_implementation_has_a_time_or_a_reason(plain):
    implementations = plain.result["implementations"]
    assert list(implementations) == ["cuda", "triton", "torch", "cpu"]
    for name, implementation in implementations.items():
        assert (implementation["us"] is None) == (implementation["reason"] is not None), name
    for name in ("torch", "cpu"):
        assert implementations[name]["us"] > 0
    if not HAS_GPU:
        assert implementations["triton"]["reason"] == plain.result["no_gpu"]


@needs_sglang
@pytest.mark.parametrize(
    ("given", "problem", "remedy"),
    [
        ("", None, None),
        ("nsa", None, None),
        ("other, nsa", None, None),
        ("nas", "misspells nsa", "set SGLANG_PLUGINS=nsa or unset it"),
        ("NSA", "misspells nsa", "set SGLANG_PLUGINS=nsa or unset it"),
        ("other", "does not name nsa", "set SGLANG_PLUGINS=other,nsa or unset it"),
        (
            "gone",
            "names gone, which is not installed, and not nsa",
            "set SGLANG_PLUGINS=nsa or unset it",
        ),
        (" ", "does not name nsa", "set SGLANG_PLUGINS=nsa or unset it"),
    ],
)
def test_sglang_plugins_is_diagnosed(given, problem, remedy, tmp_path, monkeypatch):
    """test_sglang_plugins_selects_by_name gives SGLang's own loader the same values."""
    install_other_plugin(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SGLANG_PLUGINS", given)
    discovery = environment.discovery()
    assert discovery["plugins"] == ["nsa", "other"]
    assert discovery["loads"] is (problem is None)
    if problem is not None:
        assert discovery["problem"] == f"SGLANG_PLUGINS is {given!r}, which {problem}"
    assert discovery["remedy"] == remedy


@needs_sglang
def test_a_misspelt_sglang_plugins_makes_the_verdict():
    done = command("verify", SGLANG_PLUGINS="nas", COLUMNS="80")
    assert done.returncode == 1
    assert " ".join(done.stdout.splitlines()[-2:]) == (
        "Not active: SGLANG_PLUGINS is 'nas', which misspells nsa: set SGLANG_PLUGINS=nsa or unset it"
    )


def install_other_plugin(folder: Path) -> None:
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    for name, text in OTHER_PLUGIN.items():
        (info / name).write_text(text)


def test_a_plugin_that_is_not_installed_is_not_found(monkeypatch):
    monkeypatch.setattr(environment, "entry_points", lambda group: ())
    assert environment.discovery()["problem"] == (
        "the entry point nsa of group sglang.srt.plugins is not installed"
    )


@needs_sglang
@pytest.mark.parametrize(
    ("variable", "verdict"),
    [
        ("off", "Not active: SGLANG_NSA_METADATA_BACKEND is off: unset it"),
        (
            "gpu",
            "Not active: SGLANG_NSA_METADATA_BACKEND: must be one of auto, cuda, triton, torch, off, "
            "got 'gpu'",
        ),
    ],
)
def test_the_backend_variable_makes_the_verdict(variable, verdict):
    result = outcome(command("verify", "--json", SGLANG_NSA_METADATA_BACKEND=variable))
    assert result["verdict"] == verdict


@needs_sglang
def test_a_missing_library_makes_the_verdict(tmp_path):
    gone = tmp_path / "gone.so"
    moved = "import pathlib; from sglang_nsa_plugin.kernels import library\n"
    moved += f"library.LIBRARY = pathlib.Path({str(gone)!r})"
    result = outcome(program(moved, "verify", "--json"))
    reason = (
        f"the compiled library {gone} is missing; install the wheel, or build it with `pip install .`"
    )
    assert result["implementations"]["cuda"]["reason"] == reason
    assert result["implementations"]["cpu"]["reason"] == reason
    if not HAS_GPU:
        assert result["verdict"] == f"Not active: {reason}"


@needs_sglang
def test_a_wrong_fill_is_reported():
    """The self-test passes, but the fill of realistic size is wrong."""
    wrong = """
from sglang_nsa_plugin.cli import one_fill
original = one_fill._case
made = []
def case(device):
    args = original(device)
    made.append(args)
    if len(made) % 2 == 0:
        args.req_to_token[1:] += 64
    return args
one_fill._case = case
"""
    result = outcome(program(wrong, "verify", "--json"))
    for name in ("torch", "cpu"):
        assert result["implementations"][name]["reason"] == (
            "its page_table_1 differs from the torch reference: please report this as a bug"
        )
    assert not result["works"]


def test_without_sglang_the_verdict_says_what_to_install():
    result = outcome(program("import sys; sys.modules['sglang'] = None", "verify", "--json"))
    assert result["adapter"] is None
    newest = result["sglang"]["newest_tested"]
    assert result["verdict"] == (
        f"Not active: {sys.executable} finds no SGLang: pip install sglang=={newest} into this Python, "
        "or put a source tree on PYTHONPATH"
    )
    assert result["implementations"]["cpu"]["reason"] is None


GPU_HOST: dict[str, Any] = {
    "plugin": "0.1.0",
    "package": "/site/sglang_nsa_plugin",
    "library": "/site/sglang_nsa_plugin/lib/nsa_metadata.so",
    "gpu_code": ["sm_90", "compute_90"],
    "python": "3.12.1",
    "torch": "2.11.0",
    "cuda": "13.0",
    "tvm_ffi": "0.1.11",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "no_gpu": None,
    "no_gpu_remedy": None,
    "driver_problem": None,
    "executable": "/usr/bin/python3",
    "sglang": {
        "version": "0.5.17",
        "path": "/clone/python/sglang",
        "tested": True,
        "newest_tested": "0.5.23",
    },
    "discovery": {"loads": True, "variable": None, "problem": None, "remedy": None},
    "setting": {"backend": "auto", "roles": ["draft-extend", "verify"], "problem": None},
    "adapter": {
        "name": "in-graph",
        "misfits": [],
        "broken": None,
        "roles": {"draft-extend": None, "draft-decode": "old", "verify": None},
    },
    "implementations": {name: {"reason": None} for name in ("cuda", "triton", "torch", "cpu")},
}


def verdict(**changes: Any) -> tuple[str | None, str]:
    """Why a GPU host's best kernel is not active, and its verdict otherwise; changes are a__b=value."""
    result = gpu_host(**changes)
    return verify.why_not_active(result), verify.success(result)


def gpu_host(**changes: Any) -> dict[str, Any]:
    result = copy.deepcopy(GPU_HOST)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    return result


def test_verdicts_of_a_gpu_host_where_the_kernel_runs():
    assert verdict() == (None, "Active kernel: CUDA, in the CUDA graphs of SGLang 0.5.17")
    assert verdict(adapter__name="eager", sglang__version="0.5.14") == (
        None,
        "Active kernel: CUDA, launched from Python before each draft-extend step of SGLang 0.5.14",
    )
    assert verdict(sglang__tested=False, sglang__version="0.5.24") == (
        None,
        "Active kernel: CUDA, in the CUDA graphs of SGLang 0.5.24, not a tested release: add "
        "--nsa-metadata-check 1",
    )
    assert verdict(setting__backend="triton") == (
        None,
        "Active kernel: Triton (asked for by SGLANG_NSA_METADATA_BACKEND), in the CUDA graphs of "
        "SGLang 0.5.17",
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"implementations__cuda__reason": "the library was built without nvcc; install it"},
            "Active kernel: Triton, not CUDA: the library was built without nvcc; install it",
        ),
        (
            {"implementations__triton__reason": "old", "setting__backend": "triton"},
            "Not active: SGLANG_NSA_METADATA_BACKEND asks for triton: old",
        ),
        (
            {"adapter__misfits": ["a.b is missing"]},
            "Not active: SGLang 0.5.17 does not fit the in-graph adapter (a.b is missing): use a tested "
            "release, such as 0.5.23, or a newer sglang-nsa-plugin",
        ),
        (
            {"adapter__broken": "dsa_backend.py, line 3: invalid syntax"},
            "Not active: the SGLang in /clone/python/sglang is broken (dsa_backend.py, line 3: invalid "
            "syntax): install a tested release, such as 0.5.23",
        ),
        (
            # the driver comes before what this library lacks
            {
                "driver": None,
                "driver_problem": "nvidia-smi gave no answer in 5 s",
                "no_gpu": "the NVIDIA driver does not work",
                "no_gpu_remedy": "mend it",
                "implementations__cuda__reason": "the library was built without nvcc",
            },
            "Not active: the NVIDIA driver does not work: mend it",
        ),
        (
            # there is a driver and a GPU, but this torch cannot use them
            {
                "no_gpu": "torch 2 is built without CUDA",
                "no_gpu_remedy": "install another",
                "implementations__cuda__reason": "torch 2 is built without CUDA",
            },
            "Not active: torch 2 is built without CUDA: install another",
        ),
    ],
)
def test_verdicts_of_a_gpu_host_where_the_best_kernel_is_not_active(changes, expected):
    assert verdict(**changes)[0] == expected


def test_a_library_without_a_cuda_kernel_is_of_no_use_without_a_gpu_either():
    """An image is built without a GPU, and this is its only check."""
    no_gpu = {"driver": None, "no_gpu": "sees none", "no_gpu_remedy": "install a driver"}
    of_cpu = {**no_gpu, "implementations__cuda__reason": "sees none"}
    assert verdict(**of_cpu)[0] is None
    assert verdict(**of_cpu, gpu_code=[])[0] == (
        f"Not active: the library is built for the CPU alone. Build it {findings.REBUILD}"
    )


def test_a_role_that_sglang_fills_is_in_the_verdict():
    """Only of those that the environment asks for."""
    setting = {"backend": "auto", "roles": ["draft-extend", "draft-decode"], "problem": None}
    assert verdict(setting=setting) == (
        None,
        "Active kernel: CUDA, in the CUDA graphs of SGLang 0.5.17; SGLang fills draft-decode itself",
    )


# [ok] and [--]


def in_graph_release() -> bool:
    """Whether the plugin can fill draft-decode in this SGLang."""
    if SGLANG is None:
        return False
    from integration.releases.install_sglang import release_key

    return release_key(SGLANG) >= (0, 5, 15)


INSTALL = "/usr/bin/python3 -m pip install sglang==0.5.23"


def missing(**changes: Any) -> dict[str, str]:
    """The lines with [--], and what mends each."""
    found = findings.of(gpu_host(**changes))
    return {each.name: each.remedy for each in found if each.remedy is not None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        (
            {"no_gpu": "CUDA_VISIBLE_DEVICES is ''", "no_gpu_remedy": "unset CUDA_VISIBLE_DEVICES"},
            {"GPU": "unset CUDA_VISIBLE_DEVICES"},
        ),
        (
            {"no_gpu": "sees none", "no_gpu_remedy": "install a driver", "driver": None, "gpu": None},
            {"GPU": "run this command where you serve; if that is here, install a driver"},
        ),
        ({"gpu_code": []}, {"compiled for": findings.REBUILD}),
        ({"gpu_code": None}, {"compiled for": findings.REBUILD}),
        ({"tvm_ffi": None}, {"TVM FFI": f"pip install '{library.TVM_FFI}'"}),
        ({"sglang__version": None, "adapter": None}, {"SGLang": INSTALL, "adapter": INSTALL}),
        (
            {"sglang__tested": False},
            {"SGLang": "start servers with --nsa-metadata-check 1, and compare"},
        ),
        (
            {"discovery__loads": False, "discovery__remedy": "set SGLANG_PLUGINS=nsa or unset it"},
            {"plugin loaded": "set SGLANG_PLUGINS=nsa or unset it"},
        ),
        ({"setting__backend": "off"}, {"backend": "unset SGLANG_NSA_METADATA_BACKEND"}),
        (
            {"setting__problem": "SGLANG_NSA_METADATA_CHECK: must be a whole number, got 'x'"},
            {"backend": "unset SGLANG_NSA_METADATA_CHECK"},
        ),
        ({"adapter__broken": "a.py, line 3"}, {"adapter": INSTALL}),
        ({"adapter__misfits": ["a.b is missing"]}, {"adapter": INSTALL}),
        ({"adapter__roles": {"draft-extend": None, "verify": "no a.b"}}, {"verify": INSTALL}),
    ],
)
def test_what_is_missing_and_what_mends_it(changes, expected):
    assert missing(**changes) == expected


@needs_sglang
def test_each_finding_is_a_line_with_its_mark(plain):
    listed = plain.text.partition("\n\n")[0]
    found = findings.of(plain.result)
    lines = re.findall(r"^\[(ok|--)\]  (.{17})", listed, re.MULTILINE)
    expected = [("ok" if each.remedy is None else "--", each.name) for each in found]
    assert [(mark, name.strip()) for mark, name in lines] == expected
    assert listed.count("mend: ") == sum(each.remedy is not None for each in found)
    if not HAS_GPU:
        assert ("--", "GPU") in expected


@needs_sglang
@pytest.mark.skipif(not in_graph_release(), reason="this SGLang fills draft-extend alone")
def test_a_role_that_does_not_fit_is_reported(tmp_path):
    text = (sglang_package() / BACKEND).read_text()
    old = "class DeepseekSparseAttnMultiStepBackend"
    tree = source_tree(tmp_path, BACKEND, text.replace(old, "class DeepseekSparseAttnStepsBackend"))
    asked = {"PYTHONPATH": str(tree), "SGLANG_NSA_METADATA_ROLES": "draft-extend,draft-decode"}
    done = command("verify", COLUMNS="400", **asked)
    said = "SGLang fills it: this SGLang does not fit the fill of draft-decode: "
    assert re.search(rf"^\[--\]  draft-decode +{said}", done.stdout, re.MULTILINE)
    assert re.search(r"^\[ok\]  draft-extend +fits", done.stdout, re.MULTILINE)
    assert "SGLang fills draft-decode itself" in done.stdout.split("\n\n")[-1]


def test_80_columns_are_enough_and_nothing_is_coloured(plain):
    long = command("verify", COLUMNS="80", SGLANG_PLUGINS=", ".join(["a-plugin-with-a-long-name"] * 9))
    for text in (plain.text, long.stdout):
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "\x1b" not in text
    assert long.stderr == ""


DRIVER = f"install a driver that serves CUDA {torch.version.cuda}"


@pytest.mark.parametrize(
    ("driver", "hidden", "reason", "remedy"),
    [
        ("580.1", "", "CUDA_VISIBLE_DEVICES is '' and hides the GPU", "unset CUDA_VISIBLE_DEVICES"),
        ("580.1", None, f"torch {torch.__version__} sees no NVIDIA GPU", DRIVER),
        (None, "0", f"torch {torch.__version__} sees no NVIDIA GPU", DRIVER),
    ],
)
def test_why_a_torch_with_cuda_has_no_gpu(driver, hidden, reason, remedy, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert environment._no_gpu(environment.Driver(driver)) == (reason, remedy)


# A driver that is there and broken


MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


def nvidia_smi(folder: Path, script: str) -> str:
    """A PATH on which ``nvidia-smi`` is this shell script."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(HAS_GPU, reason="the kernel runs here, whatever nvidia-smi says")
@needs_sglang
def test_a_broken_driver_makes_the_verdict(tmp_path):
    path = nvidia_smi(tmp_path, f"echo '{MISMATCH}'\nexit 18")
    result = outcome(command("verify", "--json", PATH=path))
    assert not result["works"]
    assert result["verdict"] == (
        f"Not active: the NVIDIA driver does not work: {tmp_path}/nvidia-smi says '{MISMATCH}' and ends "
        "with code 18: mend the driver (reboot after an update), or remove nvidia-smi if there is no GPU"
    )
    text = command("verify", PATH=path, COLUMNS="200")
    assert text.returncode == 1
    assert f"none: the NVIDIA driver does not work: {tmp_path}/nvidia-smi says" in text.stdout


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (f"echo '{MISMATCH}'; exit 18", f"says '{MISMATCH}' and ends with code 18"),
        (f"echo '{MISMATCH}' >&2; exit 18", f"says '{MISMATCH}' and ends with code 18"),
        ("exit 9", "says 'nothing' and ends with code 9"),
        ("kill -9 $$", "says 'nothing' and ends with code -9"),
        ("exit 0", "names no driver and GPU, but says ''"),
        ("echo No devices were found", "names no driver and GPU, but says 'No devices were found'"),
        ("printf '\\377\\376'; exit 1", "says '\ufffd\ufffd' and ends with code 1"),
        ("sleep 60 & wait", "gave no answer in 0.3 s"),
    ],
)
def test_how_nvidia_smi_fails(script, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "NVIDIA_SMI_SECONDS", 0.3 if "sleep" in script else 20)
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, script))
    driver = environment._nvidia_smi()
    assert driver == environment.Driver(problem=f"{tmp_path}/nvidia-smi {problem}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason, remedy = environment._no_gpu(driver)
    assert reason == f"the NVIDIA driver does not work: {driver.problem}"
    assert remedy.startswith("mend the driver")


def test_an_nvidia_smi_that_cannot_be_executed(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_bytes(b"\x7fELF of another machine")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._nvidia_smi().problem == f"{tool} does not run: Exec format error"


def test_a_driver_that_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, "echo 580.1, NVIDIA H200; echo 580.1, NVIDIA H200"))
    assert environment._nvidia_smi() == environment.Driver("580.1", "NVIDIA H200")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert environment._nvidia_smi() == environment.Driver()


# SGLang as a source tree


def sglang_package() -> Path:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


# Hides the distribution, as where SGLang was never installed.
WITHOUT_DIST_INFO = """
from importlib import metadata
from_name = metadata.Distribution.from_name
def without_sglang(name):
    if name == "sglang":
        raise metadata.PackageNotFoundError(name)
    return from_name(name)
metadata.Distribution.from_name = without_sglang
"""


def source_tree(folder: Path, changed: str, text: str | None) -> Path:
    """A copy of SGLang's package, of links, in which one file has another text or is missing."""
    here, there = folder / "sglang", sglang_package()
    *parents, name = Path(changed).parts
    here.mkdir()
    for parent in [*parents, name]:
        for entry in there.iterdir():
            if entry.name not in (parent, "__pycache__"):
                (here / entry.name).symlink_to(entry)
        if parent != name:
            here, there = here / parent, there / parent
            here.mkdir()
    if text is not None:
        (here / name).write_text(text)
    return folder


@needs_sglang
@pytest.mark.parametrize(
    ("text", "version", "tested"),
    [
        ("__version__ = version = '0.5.16'\n", "0.5.16", True),
        ('__version__ = "0.6.0.dev3+g12ab"\n', "0.6.0.dev3+g12ab", False),
        (None, "0.0.0.dev0", False),
    ],
)
def test_a_source_tree_without_dist_info(text, version, tested, tmp_path):
    tree = source_tree(tmp_path, "_version.py", text)
    done = program(WITHOUT_DIST_INFO, "verify", "--json", PYTHONPATH=str(tree))
    result = outcome(done)
    assert result["sglang"]["version"] == version
    assert result["sglang"]["path"] == f"{tree}/sglang"
    assert result["sglang"]["tested"] is tested
    assert result["adapter"]["misfits"] == []
    assert result["works"], result["verdict"]
    assert f"SGLang {version}" in result["verdict"]


@needs_sglang
def test_a_source_tree_goes_before_what_is_installed(tmp_path):
    tree = source_tree(tmp_path, "_version.py", "__version__ = '0.5.16'\n")
    result = outcome(command("verify", "--json", PYTHONPATH=str(tree)))
    assert (result["sglang"]["version"], result["sglang"]["path"]) == ("0.5.16", f"{tree}/sglang")


def test_a_folder_named_sglang_is_no_sglang(tmp_path, monkeypatch):
    """As where the clone's parent is the current folder."""
    (tmp_path / "sglang" / "python").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "sglang"})
    assert environment.sglang()["version"] is None


BACKEND = "srt/layers/attention/dsa_backend.py"
needs_dsa = pytest.mark.skipif(
    SGLANG is None or not (sglang_package() / BACKEND).is_file(), reason="needs SGLang's DSA backend"
)


@needs_dsa
@pytest.mark.parametrize("name", ["verify", "demo"])
def test_a_syntax_error_in_sglang(name, tmp_path):
    tree = source_tree(tmp_path, BACKEND, "import torch\n<<<<<<< HEAD\n")
    done = command(name, PYTHONPATH=str(tree), COLUMNS="400")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    where = f"{tree}/sglang/{BACKEND}, line 2: invalid syntax"
    assert where in (done.stdout if name == "verify" else done.stderr)


@needs_dsa
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "from sglang.srt.environ import renamed_yesterday",
            "cannot import name 'renamed_yesterday' from",
        ),
        ("from sglang.srt.moved_yesterday import x", "No module named 'sglang.srt.moved_yesterday'"),
    ],
)
@pytest.mark.parametrize("name", ["verify", "demo"])
def test_an_import_error_in_sglang(name, line, said, tmp_path):
    text = (sglang_package() / BACKEND).read_text()
    first, _, rest = text.partition("\nimport torch\n")
    tree = source_tree(tmp_path, BACKEND, f"{first}\n{line}\nimport torch\n{rest}")
    done = command(name, PYTHONPATH=str(tree), COLUMNS="400")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "not installed" not in done.stdout + done.stderr.replace("tvm_ffi", "")
    assert said in (done.stdout if name == "verify" else done.stderr)


# Output that is not UTF-8


@needs_sglang
@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1", "cp1252:strict", "utf-8"])
def test_every_encoding_gets_the_verdict(encoding, plain):
    done = command("verify", PYTHONIOENCODING=encoding, COLUMNS="80", encoding=encoding.split(":")[0])
    assert done.stderr == ""
    assert done.returncode == plain.code
    assert " ".join(done.stdout.split("\n\n")[-1].split()) == plain.result["verdict"]


@pytest.mark.parametrize("name", ["verify", "demo", "bench"])
def test_every_encoding_gets_the_help(name):
    done = command(name, "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


# Python of a clone with the library of an installed package


@pytest.mark.parametrize("apart", [False, True])
def test_where_python_and_library_lie_apart(apart):
    package = "/clone/sglang_nsa_plugin" if apart else "/site/sglang_nsa_plugin"
    facts = {"plugin": "0.1.0", "package": package, "library": "/site/sglang_nsa_plugin/lib/a.so"}
    places = ", Python of /clone/sglang_nsa_plugin, library of /site/sglang_nsa_plugin" if apart else ""
    assert findings._plugin(facts) == f"0.1.0{places}"


def test_the_places_of_python_and_library(plain):
    """The command runs in a folder without sources, so both are those of the installed package."""
    assert plain.result["package"] == str(library.LIBRARY.parents[1])
    assert plain.result["library"] == str(library.LIBRARY)


def test_what_the_library_was_compiled_for(plain):
    targets = environment.gpu_code_of(library.LIBRARY)
    assert plain.result["gpu_code"] == targets
    assert findings._compiled_for(targets) in " ".join(plain.text.split())


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["sm_90", "sm_103", "compute_90"], "sm_90, sm_103, PTX for compute_90"),
        ([], "the CPU alone"),
        (None, "unknown: the library cannot be read"),
    ],
)
def test_code_for_gpus_in_words(targets, said):
    assert findings._compiled_for(targets) == said


def test_a_library_that_cannot_be_read(tmp_path):
    truncated = tmp_path / "nsa_metadata.so"
    assert environment.gpu_code_of(truncated) is None
    truncated.write_bytes(library.LIBRARY.read_bytes()[:5000])
    assert environment.gpu_code_of(truncated) is None
