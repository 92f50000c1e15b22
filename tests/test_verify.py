"""``sglang-nsa-plugin verify``: its text, exit code, JSON, and how long it takes."""

from __future__ import annotations

import copy
import json
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import SGLANG, command, needs_sglang, program
from conftest import HAS_GPU

from sglang_nsa_plugin.adapters import releases
from sglang_nsa_plugin.cli import environment, verify

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
    assert plain.code == 0
    assert plain.seconds < 20
    verdict = " ".join(plain.text.split("\n\n")[-1].split())
    assert verdict == plain.result["verdict"]
    if HAS_GPU:
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
    assert result["sglang"] == {"version": SGLANG, "tested": True, "newest_tested": releases.TESTED[-1]}
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
    without = """
from sglang_nsa_plugin.cli import environment
installed = environment.distribution
environment.distribution = lambda name: None if name == "sglang" else installed(name)
"""
    result = outcome(program(without, "verify", "--json"))
    assert result["adapter"] is None
    newest = result["sglang"]["newest_tested"]
    assert result["verdict"] == (
        f"Not active: SGLang is not installed in this Python: pip install sglang=={newest}"
    )
    assert result["implementations"]["cpu"]["reason"] is None


GPU_HOST: dict[str, Any] = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "no_gpu": None,
    "no_gpu_remedy": None,
    "sglang": {"version": "0.5.17", "tested": True, "newest_tested": "0.5.23"},
    "discovery": {"loads": True},
    "setting": {"backend": "auto", "problem": None},
    "adapter": {"name": "in-graph", "misfits": []},
    "implementations": {name: {"reason": None} for name in ("cuda", "triton", "torch", "cpu")},
}


def verdict(**changes: Any) -> tuple[str | None, str]:
    """Why a GPU host's best kernel is not active, and its verdict otherwise; changes are a__b=value."""
    result = copy.deepcopy(GPU_HOST)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    return verify.why_not_active(result), verify.success(result)


def test_verdicts_of_a_gpu_host_where_the_kernel_runs():
    assert verdict() == (None, "Active kernel: CUDA, in the draft-extend graph of SGLang 0.5.17")
    assert verdict(adapter__name="eager", sglang__version="0.5.14") == (
        None,
        "Active kernel: CUDA, in one launch before each draft-extend step of SGLang 0.5.14",
    )
    assert verdict(sglang__tested=False, sglang__version="0.5.24") == (
        None,
        "Active kernel: CUDA, in the draft-extend graph of SGLang 0.5.24, not a tested release: add "
        "--nsa-metadata-check 1",
    )
    assert verdict(setting__backend="triton") == (
        None,
        "Active kernel: Triton (asked for by SGLANG_NSA_METADATA_BACKEND), in the draft-extend graph of "
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
    assert environment._no_gpu(driver) == (reason, remedy)
