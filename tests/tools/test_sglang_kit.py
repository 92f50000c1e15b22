"""SGLang's own kit for DSA metadata with the plugin active, on CPU tensors; it came with 0.5.20."""

from __future__ import annotations

import importlib

import pytest
import torch

from integration.gpu import sglang_kit
from sglang_nsa_plugin.state import ALL_ROLES

has_kit = sglang_kit.is_there()


@pytest.mark.skipif(has_kit, reason="this SGLang has the kit")
def test_without_the_kit_the_result_says_which_releases_have_it():
    found = sglang_kit.run()
    assert not found["passed"]
    assert found["why"].endswith("0.5.20 and later have it")


@pytest.mark.skipif(not has_kit, reason="this SGLang has no such kit")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: gpu_test --only sglang_kit")
def test_every_role_passes_the_kit(monkeypatch):
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    kit = importlib.import_module(sglang_kit.KIT)
    rounds = (([64, 128, 2040, 653], [0, 2, 4, 6]), ([63, 9, 65, 1], [7, 5, 3, 1]))
    monkeypatch.setattr(kit, "WIDTH", 2048)
    monkeypatch.setattr(kit, "ROUNDS", rounds)
    # the plan's kernel is a GPU's
    no_plan = lambda self, seqlens_expanded: None  # noqa: E731
    monkeypatch.setattr(DeepseekSparseAttnBackend, "_build_topk_v2_plan", no_plan)
    with sglang_kit.CudaIsCpu():
        found = sglang_kit.run()
    assert found["passed"], found
    assert set(found["roles"]) == set(ALL_ROLES)
    for each in found["roles"].values():
        assert each["rounds_equal"] == each["replays_by_plugin"] == 2
        assert each["planted_error_found"]
