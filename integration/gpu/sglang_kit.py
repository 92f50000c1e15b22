"""SGLang's own kit for DSA metadata, with the plugin active: 0.5.20 and later bring it.

    python3 -m integration.gpu.gpu_test --only sglang_kit
    python3 -m integration.gpu.sglang_kit [--json FILE]

The kit (``sglang/test/kits/dsa_metadata_kit.py``) makes a backend with real metadata kernels, has rounds
of lengths and requests, and compares two metadata objects. Here each plan of a speculative step is
captured from one such backend, which the plugin has taken over, and replayed for each round; SGLang's
own code fills another one. The kit's comparison judges, the plugin's counters say who filled, and a
planted error has to be found.

The kit is written for k-pooling (its ``POOL``), which the plugin leaves to SGLang: with a pool of 1 the
same kit runs for the models that have none. Needs an NVIDIA GPU with sm_90 or newer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import unittest
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang_nsa_plugin.adapters import taken_over
from sglang_nsa_plugin.adapters.roles import DRAFT_DECODE_ROLE, Role
from sglang_nsa_plugin.harness.process_stubs import activate_plugin, stub_process

KIT = "sglang.test.kits.dsa_metadata_kit"
WARM_UPS = 2  # as SGLang's runners


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    found = run()
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if found["passed"] else 1


def run() -> dict[str, Any]:
    """Every role; without the kit, what there is to say."""
    if not is_there():
        return {"passed": False, "why": f"this SGLang has no {KIT}; 0.5.20 and later have it"}
    kit: Any = importlib.import_module(KIT)
    with mock.patch.object(kit, "POOL", 1):
        roles = {role.name: run_role(kit, role) for role in taken_over.ROLES}
    return {"passed": all(role["passed"] for role in roles.values()), "kit": KIT, "roles": roles}


def is_there() -> bool:
    """Whether the installed SGLang has the kit."""
    try:
        return importlib.util.find_spec(KIT) is not None
    except ModuleNotFoundError:  # nor the package that it would be in
        return False


def run_role(kit: Any, role: Role) -> dict[str, Any]:
    """The kit's rounds of one plan; counts are of this role alone."""
    activate_plugin("auto", 0, role.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (mode,) = role.modes()
    state = role.state
    before = state.replays
    with stub_process(device):
        plan = Plan(kit, mode, role)
        plan.take_over()
        replay = plan.capture()
        compared = [plan.round(replay, lengths, requests) for lengths, requests in kit.ROUNDS]
        found = plan.finds_planted_error()
    replays = state.replays - before
    return {
        "passed": all(compared) and found and replays == len(kit.ROUNDS) and not state.fallbacks,
        "implementation": state.backend,
        "rounds": len(kit.ROUNDS),
        "rounds_equal": sum(compared),
        "replays_by_plugin": replays,
        "captures": sorted(state.captures),
        "fallbacks": dict(state.fallbacks),
        "planted_error_found": found,
        "reason": state.reason,
    }


class Plan:
    """Two of the kit's backends over the same inputs; the first one is the plugin's."""

    def __init__(self, kit: Any, mode: Any, role: Role) -> None:
        self.kit, self.mode, self.role = kit, mode, role
        self.seq_lens, self.requests = kit.inputs(*kit.ROUNDS[0])
        self.backend = kit.make_backend(mode, self.seq_lens, self.requests)
        self.sglangs = kit.make_backend(mode, self.seq_lens, self.requests)
        self.owner = self._multi_step() if role is DRAFT_DECODE_ROLE else self.backend

    def _multi_step(self) -> Any:
        """Draft-decode's owner: SGLang's multi-step backend, with one draft step."""
        from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnMultiStepBackend

        owner = object.__new__(DeepseekSparseAttnMultiStepBackend)
        owner.attn_backends = [self.backend]
        owner.topk, owner.speculative_num_steps = 1, 2
        return owner

    def take_over(self) -> None:
        """The kit's backends are made without the constructor that the plugin hooks."""
        taken_over.consider(self.owner, self.backend, None, self.role, lambda *_: None)
        if not hasattr(self.owner, taken_over.ATTRIBUTE):
            raise RuntimeError(f"{self.role.name} was not taken over: {self.role.state.reason}")

    def capture(self) -> Callable[[], None]:
        """The graph, made as a runner makes it; on the CPU, what the graph would hold."""

        def record() -> None:
            self.owner.init_forward_metadata_in_graph(self._batch())

        for _ in range(WARM_UPS):
            record()
        if not torch.cuda.is_available():
            return record
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            record()
        return graph.replay

    def round(self, replay: Callable[[], None], lengths: list[int], requests: list[int]) -> bool:
        """One step with these numbers by both; whether the kit finds all alike, at the same places."""
        for kept, new in zip(
            (self.seq_lens, self.requests), self.kit.inputs(lengths, requests), strict=True
        ):
            kept.copy_(new)
        self.kit.apply_metadata(self.sglangs, self.mode, self.seq_lens, self.requests)
        metadata = self._metadata(self.backend)
        addresses = self.kit.addresses(metadata)
        self.owner.init_forward_metadata_out_graph(self._batch())
        replay()
        is_same_object = self.backend.forward_metadata is metadata
        if torch.cuda.is_available():  # on the CPU each recording makes a plan of its own
            is_same_object = is_same_object and self.kit.addresses(metadata) == addresses
        return is_same_object and self._alike()

    def finds_planted_error(self) -> bool:
        """Whether the kit sees one wrong number."""
        self._metadata(self.backend).dsa_cache_seqlens_int32[-1] += 1
        return not self._alike()

    def _alike(self) -> bool:
        pair = self._metadata(self.backend), self._metadata(self.sglangs)
        try:
            self.kit.assert_metadata_equal(unittest.TestCase(), *pair)
        except AssertionError as error:
            print(f"{self.role.name}: {error}")
            return False
        return True

    def _metadata(self, backend: Any) -> Any:
        return backend.decode_cuda_graph_metadata[self.kit.BS]

    def _batch(self) -> SimpleNamespace:
        return SimpleNamespace(
            batch_size=self.kit.BS,
            forward_mode=self.mode,
            seq_lens=self.seq_lens,
            req_pool_indices=self.requests,
            seq_lens_cpu=None,
            spec_info=None,
        )


class CudaIsCpu(torch.overrides.TorchFunctionMode):
    """The kit asks for CUDA tensors by name: inside, without a GPU, they are on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


if __name__ == "__main__":
    raise SystemExit(main())
