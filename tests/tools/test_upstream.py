"""The scripts of docs/upstream/, two against SGLang's own code, with the GPU's part replaced."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_nsa_plugin.adapters import in_graph

UPSTREAM = Path(__file__).resolve().parent.parent.parent / "docs" / "upstream"
CLUSTER_FLOOR = 65_536  # longer rows are left to the items of the plan
COPIES = (
    "sglang.kernels.ops.attention.fused_metadata_copy",
    "sglang.kernels.ops.attention.dsa.fused_metadata_copy",  # since 0.5.22
)
TRANSFORMS = ("topk_transform_paged_v2", "topk_transform_512_v2")  # since 0.5.23, and before

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not in_graph.is_generation(),
    reason="SGLang 0.5.15 or later on the CPU; on a GPU, the scripts themselves are run",
)


def script(name):
    spec = importlib.util.spec_from_file_location(name, UPSTREAM / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_paged_mqa_logits_metadata(lengths, block, processors):
    """Not DeepGEMM's values, but as these a function of all lengths."""
    work = lengths.flatten().cumsum(0)[-1].item()
    ends = torch.arange(processors + 1) * work // processors
    return torch.stack([ends, ends // block], dim=1).int()


def plan_topk_v2(lengths, static_threshold=0):
    plan = torch.zeros((len(lengths) + 1, 2), dtype=torch.int32)
    items = [(row, length) for row, length in enumerate(lengths.tolist()) if length > CLUSTER_FLOOR]
    plan[0] = torch.tensor([CLUSTER_FLOOR, len(items)])
    for number, item in enumerate(items):
        plan[1 + number] = torch.tensor(item)
    return plan


def topk_transform_v2(scores, lengths, tables, out, page_size, plan):
    """Where it writes, not what."""
    listed = set(plan[1 : 1 + int(plan[0, 1]), 0].tolist())
    for row, length in enumerate(lengths.tolist()):
        if length <= plan[0, 0] or row in listed:
            count = min(length, out.shape[1])
            out[row, :count] = tables[row, 0] * page_size + torch.arange(count)


def fused_metadata_copy_multi_cuda(*arguments):
    """Eight sources, then as many targets of each of three backends."""
    sources = arguments[:8]
    for first in (8, 16, 24):
        for source, target in zip(sources, arguments[first : first + 8], strict=True):
            if source is not None:
                target[..., : source.shape[-1]].copy_(source)


@pytest.fixture
def stale(monkeypatch):
    """The script, in a process that takes itself for one with a GPU of SM90."""
    from sglang.srt.layers.attention import dsa_backend

    deep_gemm = SimpleNamespace(
        get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata, get_num_sms=lambda: 132
    )
    topk = importlib.import_module("sglang.kernels.ops.attention.dsv4.topk")
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    monkeypatch.setattr(dsa_backend, "deep_gemm", deep_gemm, raising=False)
    monkeypatch.setattr(dsa_backend, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(topk, "plan_topk_v2", plan_topk_v2)
    name = next(name for name in TRANSFORMS if hasattr(topk, name))
    monkeypatch.setattr(topk, name, topk_transform_v2)
    return script("stale_draft_plans")


@pytest.fixture
def with_fused_copy(monkeypatch):
    for name in COPIES:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            monkeypatch.setattr(module, "fused_metadata_copy_multi_cuda", fused_metadata_copy_multi_cuda)


def steps_of(stale, steps, requests=64, prompt=70_000):
    lengths = torch.full((requests,), stale.SHORT)
    lengths[0] = prompt
    backends = stale.replayed(torch.device("cpu"), steps, lengths)
    return [stale.look_at(backend, lengths) for backend in backends]


STALE = {
    "lengths": "right",
    "schedule": "WRONG",
    "top-k plan": "WRONG",
    "top-k of the first request": "0 of 2048",
}
RIGHT = {**dict.fromkeys(STALE, "right"), "top-k of the first request": "2048 of 2048"}


def test_three_draft_steps_keep_the_plans_of_their_capture(stale, with_fused_copy):
    """SGLang's code, line by line: which of the tensors a replay writes, with 5 steps and with 4."""
    assert steps_of(stale, 5) == [STALE, STALE, STALE, RIGHT]
    assert steps_of(stale, 4) == [STALE, STALE, STALE]


def test_up_to_three_steps_all_plans_are_written(stale, with_fused_copy):
    assert steps_of(stale, 3) == [RIGHT, RIGHT]


def test_sglangs_own_fallback_writes_them_all(stale, capsys):
    """Where the fused copy fails, as it does without a GPU, every backend gets its plans."""
    assert steps_of(stale, 5) == [RIGHT] * 4
    assert "falling back to loop" in capsys.readouterr().out


def test_for_few_requests_the_plan_is_not_looked_at(stale, with_fused_copy):
    (first, *_) = steps_of(stale, 5, requests=30)
    assert (first["schedule"], first["top-k plan"]) == ("WRONG", "not looked at")


def test_the_dsa_backend_does_not_say_which_tree_mask_it_wants(monkeypatch):
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    unread = script("unread_tree_mask")
    assert not unread.says_which_mask()
    monkeypatch.setattr(DeepseekSparseAttnBackend, "verify_mask", property(lambda _: None))
    assert unread.says_which_mask()


def test_the_tree_is_asked_for_as_sglang_does(monkeypatch):
    """The mask's size; the kernel behind it needs a GPU."""
    from sglang.srt.speculative import eagle_utils

    unread = script("unread_tree_mask")
    asked = []
    for kernel in (
        "sgl_build_tree_kernel_efficient",
        "build_tree_kernel_efficient_func",
    ):  # since 0.5.23
        monkeypatch.setattr(eagle_utils, kernel, lambda *args: asked.append(args), raising=False)
    masks = {mode: unread.tree(mode, 3, 4, 1_000, "cpu")[0] for mode in ("FULL_MASK", "QLEN_ONLY")}
    assert masks["FULL_MASK"].numel() == 3 * 1_000 * 4 + 3 * 4 * 4
    assert masks["QLEN_ONLY"].numel() == 3 * 4 * 4
    assert len(asked) == 2


def test_without_a_gpu_the_freed_workspace_is_not_shown():
    path = UPSTREAM / "freed_cublas_workspace.py"
    for case in ([], ["drop+empty"]):
        hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, path, *case]
        done = subprocess.run(command, capture_output=True, text=True, env=hidden, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "freed_cublas_workspace.py needs an NVIDIA GPU and PyTorch with CUDA.\n"


@pytest.mark.parametrize(
    ("replay", "returncode"), [("right", 0), ("WRONG", 1), ("CUDA error: an illegal access", 1)]
)
def test_the_freed_workspace_is_told_case_by_case(monkeypatch, capsys, replay, returncode):
    """The last of the cases finds this, and the others are right."""
    freed = script("freed_cublas_workspace")
    kept = {"freed_mib": 0, "unmapped_mib": 0, "replay": "right"}
    found = {**dict.fromkeys(freed.CASES, kept), freed.CASES[-1]: {**kept, "replay": replay}}

    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, f"a line\n{json.dumps(found[command[-1]])}\n", "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(freed.subprocess, "run", run)
    assert freed.main() == returncode
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(", a GPU")
    assert [line.split()[0] for line in lines] == list(freed.CASES)
    assert lines[-1].endswith(f"0 MiB freed, 0 unmapped; replay of B: {replay}")


def test_a_case_whose_process_printed_no_result_did_not_replay_right(monkeypatch):
    freed = script("freed_cublas_workspace")
    ended = subprocess.CompletedProcess([], -6, "", "terminate called\nReturning 700")
    monkeypatch.setattr(freed.subprocess, "run", lambda *_, **__: ended)
    assert freed.in_a_process("drop+empty") == {"replay": "exit code -6, Returning 700"}
