"""SGLang's own NSA/DSA backend of 0.5.11 to 0.5.14, which plans draft-extend steps eagerly.

0.5.11 and 0.5.12 also replay ragged graphs. On CPU tensors Triton's interpreter runs the one kernel that
SGLang needs, and the tables that CUDA libraries make stay None.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang_nsa_plugin.adapters.eager_names import SglangNames, names_of_generation
from sglang_nsa_plugin.harness.backend import HarnessBackend
from sglang_nsa_plugin.harness.process_stubs import on_cpu, without_copy_kernels

DP_SIZE = 2  # data-parallel ranks of a batch with global_num_tokens


class EagerBackend(HarnessBackend):
    """A :class:`HarnessBackend` made by the backend's constructor, as a draft worker makes it."""

    @functools.cached_property
    def names(self) -> SglangNames:
        """This release's names for what was renamed."""
        return names_of_generation()

    def stub_process(self) -> contextlib.AbstractContextManager[None]:
        """To be entered around calls of SGLang's code. On CUDA it changes only the topology."""
        return stub_process(self.device, self.names)

    def _backend_settings(self, decode_impl: str) -> dict[str, str]:
        prefix = self.names.prefix
        return {f"{prefix}_prefill_backend": decode_impl, f"{prefix}_decode_backend": decode_impl}

    def _make_backend(self) -> Any:
        module, _, name = self.names.backend.rpartition(".")
        return getattr(importlib.import_module(module), name)(self.model_runner)

    def batch(self, bs: int, global_num_tokens: list[int] | None = None) -> Any:
        """A draft-extend batch of the first bs requests, in tensors of its own, as SGLang makes it."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        n = self.draft_tokens
        seq_lens = self.inputs.seq_lens[:bs].clone()
        seq_lens_cpu = seq_lens.to("cpu", copy=True)
        batch = ForwardBatch(
            forward_mode=ForwardMode.DRAFT_EXTEND_V2,
            batch_size=bs,
            input_ids=self._zeros(bs * n),
            req_pool_indices=self.inputs.req_pool_indices[:bs].clone(),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens_cpu,
            seq_lens_sum=int(seq_lens_cpu.sum()),
            out_cache_loc=self._zeros(bs * n),
            positions=self._zeros(bs * n),
            extend_num_tokens=bs * n,
            extend_seq_lens=torch.full((bs,), n, dtype=torch.int32, device=self.device),
            extend_seq_lens_cpu=[n] * bs,
            extend_prefix_lens_cpu=[max(length - n, 0) for length in seq_lens_cpu.tolist()],
            global_num_tokens_cpu=global_num_tokens,
        )
        batch.req_to_token_pool = self.model_runner.req_to_token_pool  # where 0.5.12 and earlier look
        return batch

    def plan(self, batch: Any) -> None:
        """Plans a step as SGLang's worker does, with the hooks."""
        with self.stub_process():
            self.backend.init_forward_metadata(batch)

    def sglang_plan(self, batch: Any) -> None:
        """The same by SGLang's own code, without the hooks on the class."""
        original = inspect.unwrap(type(self.backend).init_forward_metadata)
        with self.stub_process():
            original(self.backend, batch)

    def capture_setup(self, bs: int) -> None:
        """Makes the metadata of a ragged graph of batch size bs, as the runner does before a capture."""
        if not hasattr(self.backend, "decode_cuda_graph_metadata"):
            with self.stub_process():
                self.backend.init_cuda_graph_state(self.max_bs, self.max_bs * self.draft_tokens)
        with self.stub_process():
            self.backend.init_forward_metadata_capture_cuda_graph(
                bs=bs,
                num_tokens=bs * self.draft_tokens,
                req_pool_indices=self.inputs.req_pool_indices[:bs],
                seq_lens=self.inputs.seq_lens[:bs],
                encoder_lens=None,
                forward_mode=_ragged_mode(),
                spec_info=None,
            )

    def replay(self, bs: int, accepted: torch.Tensor) -> None:
        """Calls the backend, with its hooks, as the runner does before it replays a ragged graph."""
        with self.stub_process():
            self.backend.init_forward_metadata_replay_cuda_graph(**self._replay_arguments(bs, accepted))

    def sglang_replay(self, bs: int, accepted: torch.Tensor) -> None:
        """The same by SGLang's own code, without the hooks on the class."""
        original = inspect.unwrap(type(self.backend).init_forward_metadata_replay_cuda_graph)
        with self.stub_process():
            original(self.backend, **self._replay_arguments(bs, accepted))

    def _replay_arguments(self, bs: int, accepted: torch.Tensor) -> dict[str, Any]:
        return {
            "bs": bs,
            "req_pool_indices": self.inputs.req_pool_indices,
            "seq_lens": self.inputs.seq_lens,
            "seq_lens_sum": int(self.inputs.seq_lens[:bs].sum()),
            "encoder_lens": None,
            "forward_mode": _ragged_mode(),
            "spec_info": SimpleNamespace(num_accept_tokens=accepted, num_accepted_tokens=accepted),
            "seq_lens_cpu": self.inputs.seq_lens.cpu(),
        }

    def _zeros(self, tokens: int) -> torch.Tensor:
        """int64 zeros, one for each token: a field that planning does not read."""
        return torch.zeros(tokens, dtype=torch.int64, device=self.device)


def _ragged_mode() -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return ForwardMode.DRAFT_EXTEND


@contextlib.contextmanager
def stub_process(device: torch.device, names: SglangNames) -> Iterator[None]:
    """What a launched process or a GPU would supply to SGLang's backend.

    Everywhere: attention TP and CP of size 1, rank 0 of DP. On the CPU also: the compute capability
    9.0, which the constructor asks for; the launcher of the one Triton kernel, which asserts CUDA
    tensors; and no CUDA kernel that copies draft-decode's metadata.
    """
    module = importlib.import_module(names.module)
    with contextlib.ExitStack() as stack:
        for owner, name, size in _topology(module, importlib.import_module(f"{names.package}.utils")):
            if hasattr(owner, name):  # only where the release reads it
                stack.enter_context(mock.patch.object(owner, name, return_value=size))
        with contextlib.suppress(ModuleNotFoundError):  # since 0.5.14
            from sglang.srt.runtime_context import get_parallel

            parallel = get_parallel().override(attn_tp_size=1, attn_cp_size=1, attn_dp_rank=0)
            stack.enter_context(parallel)
        if device.type == "cpu":
            stack.enter_context(
                mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))
            )
            launcher = on_cpu(module.seqlens_expand_triton)
            stack.enter_context(mock.patch.object(module, "seqlens_expand_triton", launcher))
            stack.enter_context(without_copy_kernels())
        yield


def _topology(backend: ModuleType, utils: ModuleType) -> Iterator[tuple[ModuleType, str, int]]:
    """Functions that read torch.distributed, where each is looked up, and what they return here."""
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.utils import cp_utils

    yield backend, "get_attention_tp_size", 1
    yield utils, "get_attention_cp_size", 1
    yield utils, "get_attention_dp_rank", 0
    yield cp_utils, "get_attention_cp_size", 1
    yield dp_attention, "get_attention_dp_size", DP_SIZE
