"""What integration/gpu/sanitizers.py reads from the tools' output; compute-sanitizer is a stand-in."""

from __future__ import annotations

import re

import pytest
import torch
from memcpy_trace import MemcpyTrace

from integration.gpu import sanitizers

# Prints FINDING as each tool's output, and a closing line of pytest.
STAND_IN = """#!/bin/sh
if [ "$1" = --help ]; then echo "  --kernel-name arg  filter"; exit; fi
echo "========= COMPUTE-SANITIZER"
FINDING
echo "SKIPPED [2] tests/test_values.py:403: not under compute-sanitizer: 17 GB"
echo "SKIPPED [1] tests/conftest.py:135: needs two GPUs"
echo "5 passed, 3 skipped, 100 deselected in 3.21s"
echo "sanitized fills: 130, wrong: 0"
"""
CLEAN = 'echo "========= ERROR SUMMARY: 0 errors"'
OF_OURS = """
echo "========= Uninitialized __global__ memory read of size 4 bytes"
echo "=========     at void nsa::(anonymous namespace)::fill_kernel<(bool)1>(nsa::Fill)+0x1a0"
echo "========= ERROR SUMMARY: 1 error"
"""
OF_OTHERS = OF_OURS.replace("nsa::(anonymous namespace)::fill", "at::(anonymous namespace)::reduce")
READ = """\
========= Host API memory access error at host access to 0x7ef0 of size 64 bytes
=========     Uninitialized access to 0x7f0e on access by cudaMemcpy source
"""
OF_A_COPY = f"""cat <<'END'
copy of 0x7ef0, 64 bytes, for ASKER
{READ}========= ERROR SUMMARY: 1 error
END
"""
OF_SGLANGS_COPY = OF_A_COPY.replace("ASKER", "sglang.srt.backend.copy_")
OF_OUR_COPY = OF_A_COPY.replace("ASKER", "sglang_nsa_plugin.kernels.torch._write")
CRASHED = "exit 1"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def say(finding: str) -> None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(STAND_IN.replace("FINDING", finding))
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return say


def test_clean_tools_pass_with_their_number_of_tests(stand_in):
    stand_in(CLEAN)
    found = sanitizers.sanitize_tests()
    assert found.pop("passed")
    assert list(found) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for tool in found.values():
        assert (tool["errors"], tool["copies_of_sglang"]) == (0, 0)
        assert tool["tests"] == {"passed": 30, "skipped": 18}  # of six processes
        assert tool["left_out"] == {"17 GB": 12}


@pytest.mark.parametrize(
    ("finding", "initcheck", "named", "others"),
    [
        (OF_OURS, (6, 0), [], 6),
        (OF_OTHERS, (6, 0), ["at::reduce_kernel"], 6),
        (OF_SGLANGS_COPY, (0, 6), ["cudaMemcpy source"], 6),
        (OF_OUR_COPY, (6, 0), ["cudaMemcpy source"], 6),
        (CRASHED, (None, 0), [], None),
    ],
    ids=["of ours", "of others", "of SGLang's copy", "of our copy", "crashed"],
)
def test_all_findings_count_but_copies_that_sglang_asked_for(
    stand_in, finding, initcheck, named, others
):
    stand_in(finding)
    found = sanitizers.sanitize_tests()
    assert not found["passed"]
    tool = found["initcheck"]
    assert (tool["errors"], tool["copies_of_sglang"]) == initcheck
    assert tool["found_elsewhere"] == named
    assert tool["passed"] == (finding == OF_SGLANGS_COPY)
    assert found["memcheck"]["errors"] == others


@pytest.mark.parametrize(
    ("traced", "by"),
    [
        (["0x7ef0, 64 bytes, for ours.fill"], "ours.fill"),
        (["0x7ef0, 30 bytes, for ours.fill"], sanitizers.UNKNOWN),
        (["0x7f0f, 64 bytes, for ours.fill"], sanitizers.UNKNOWN),
        (["0x7ef0, 64 bytes, for ours.fill", "0x7f00, 32 bytes, for plan"], "plan"),
        (
            [
                "0x7ef0, 64 bytes, for ours.fill",
                "0x7f00, 32 bytes, for plan",
                "0x7ef0, 64 bytes, for ours.fill",
            ],
            "ours.fill",
        ),
    ],
    ids=["inside", "ends before", "begins after", "the newest", "again"],
)
def test_a_copy_is_of_who_asked_for_it(traced, by):
    output = "".join(f"copy of {copy}\n" for copy in traced) + READ
    assert list(sanitizers.reads_by_copies(output)) == [(by, READ.rstrip())]


def test_copies_are_printed_as_they_are_looked_for(capsys):
    source = torch.zeros(3, 5)[:, :4]
    with MemcpyTrace("cpu"):
        for copied in (torch.empty(3, 4).copy_, torch.clone, lambda tensor: tensor.to("meta")):
            copied(source)
        torch.add(source, 1)
        source[0, 0].item()
    traced = [sanitizers.TRACED_COPY.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    asker = f"{__name__}.test_copies_are_printed_as_they_are_looked_for"
    address = hex(source.data_ptr())
    assert [copy.groupdict() for copy in traced] == [
        {"address": address, "bytes": size, "asker": by}
        for size, by in (("56", asker), ("56", asker), ("56", f"{__name__}.<lambda>"), ("4", asker))
    ]


@pytest.mark.parametrize(
    ("module", "dtype", "printed"),
    [
        (__name__, torch.int32, 0),
        ("sglang.srt.backend", torch.int32, 1),
        (__name__, torch.int64, 0),
        ("sglang.srt.backend", torch.int64, 0),
    ],
    ids=["ours", "SGLang's", "ours, another type", "SGLang's, another type"],
)
def test_a_copy_that_a_kernel_makes_is_not_printed(monkeypatch, capsys, module, dtype, printed):
    """SGLang's own copies are printed; between dtypes torch uses a kernel."""
    monkeypatch.setitem(globals(), "__name__", module)
    source = torch.arange(-2, 2, dtype=torch.int32)
    target = torch.full((3, 8), 7, dtype=dtype)
    with MemcpyTrace("cpu"):
        assert target[:, ::2].copy_(source).data_ptr() == target.data_ptr()
        source.to(torch.int64)
    assert torch.equal(target[:, ::2], source.to(dtype).expand(3, 4))
    assert bool((target[:, 1::2] == 7).all())
    assert capsys.readouterr().out.count("copy of") == printed


def test_what_nothing_explains_is_shown(stand_in, capsys):
    stand_in(OF_OUR_COPY)
    sanitizers.sanitize_vast_tests()
    assert f"asked for by sglang_nsa_plugin.kernels.torch._write:\n{READ}" in capsys.readouterr().out
    stand_in(OF_SGLANGS_COPY)
    sanitizers.sanitize_vast_tests()
    assert "asked for by" not in capsys.readouterr().out


def test_what_holds_17_gb_is_watched_apart(stand_in, monkeypatch):
    stand_in(CLEAN)
    calls = []
    run = sanitizers._run
    monkeypatch.setattr(sanitizers, "_run", lambda *call: calls.append(call) or run(*call))
    assert list(sanitizers.sanitize_tests()) == ["passed", *sanitizers.TOOLS]
    assert all("gpu and not vast" in arguments for _, arguments, _ in calls)
    calls.clear()
    assert sanitizers.sanitize_vast_tests()["passed"]
    assert [tool for tool, _, _ in calls] == ["memcheck", "racecheck", "synccheck"]
    assert all("gpu and vast" in arguments for _, arguments, _ in calls)


def test_fills_pass_only_where_planted_errors_are_found(stand_in):
    stand_in(CLEAN)
    found = sanitizers.sanitize_fills()
    assert found["memcheck"]["fills"] == 130
    assert found["planted"] == {"memcheck": 0, "initcheck": 0}
    assert not found["passed"]
    stand_in(f'case "$*" in *--planted*) {OF_OURS} ;; *) {CLEAN} ;; esac')
    found = sanitizers.sanitize_fills()
    assert found["planted"] == {"memcheck": 1, "initcheck": 1}
    assert found["passed"]


def test_our_kernels_alone_are_watched_where_that_is_possible(stand_in):
    stand_in(CLEAN)
    assert "kernel_substring=fill_kernel" in sanitizers._tool("memcheck")
    assert not any("kernel" in part for part in sanitizers._tool("initcheck"))


def test_the_kernels_have_the_names_that_are_watched():
    csrc = sanitizers.ROOT / "csrc"
    sources = [*csrc.glob("*.cu"), sanitizers.ROOT / "sglang_nsa_plugin" / "kernels" / "triton.py"]
    text = "".join(path.read_text() for path in sources)
    kernels = re.findall(r"__global__[^{;]*?(\w+)\((?:const __grid_constant__|\))", text)
    assert len(kernels) == text.count("__global__")
    assert all(any(name in kernel for name in sanitizers.KERNELS) for kernel in kernels)
    assert "def _fill_kernel(" in text
