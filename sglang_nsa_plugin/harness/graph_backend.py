"""SGLang's own DSA backends whose plans are for CUDA graphs: of a speculative step, and plain decode.

All of 0.5.15 and later. Of 0.5.13 and 0.5.14 those of draft-decode and verify, which need the
lengths on the host, too.

On CUDA tensors everything is real. On CPU tensors SGLang takes its torch path, also where the index is
pooled: Triton's interpreter runs the few kernels that it needs, and the DeepGEMM schedule, the top-k
plan and the FlashMLA metadata stay None.
"""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import torch

from sglang_nsa_plugin.adapters import draft_decode, fields, in_graph, mqa_schedule
from sglang_nsa_plugin.adapters.eager_names import DSA
from sglang_nsa_plugin.harness import eager_backend, process_stubs, sglang_kernel
from sglang_nsa_plugin.harness.backend import HarnessBackend
from sglang_nsa_plugin.state import DECODE, DRAFT_DECODE, DRAFT_EXTEND, VERIFY


class GraphBackend(HarnessBackend):
    """A :class:`HarnessBackend` that SGLang's own code makes, so hooks run.

    Args:
        role: "draft-extend" for the backend of SGLang's DraftBackendFactory, "draft-decode" for the one
            that holds a backend for each draft step, "verify" for the target's, "decode" for that of a
            server without speculation, which has no draft tokens.
    """

    def __init__(
        self, *args: Any, role: str = DRAFT_EXTEND, draft_tokens: int = 4, **kwargs: Any
    ) -> None:
        self.role = role
        tokens = 1 if role == DECODE else draft_tokens  # of a request in a step
        super().__init__(*args, draft_tokens=tokens, **kwargs)

    @property
    def longest(self) -> int:
        """Up to 0.5.14 the graphs' page tables have columns for the context and the draft tokens."""
        if in_graph.is_generation():
            return super().longest
        return int(self.model_runner.model_config.context_len)

    def _shortest(self) -> int:
        """SGLang's top-k plan takes no negative length, and pooled ones are not clamped at 0."""
        is_pooled_extend = self.role == DRAFT_EXTEND and self.index_kpool > 1
        return self.draft_tokens if is_pooled_extend else super()._shortest()

    def stub_process(self) -> contextlib.AbstractContextManager[None]:
        """To be entered around calls of SGLang's code. On CUDA it changes only the topology."""
        if in_graph.is_generation():
            return process_stubs.stub_process(self.device)
        return eager_backend.stub_process(self.device, DSA)

    def _speculation(self) -> dict[str, Any]:
        names = super()._speculation()
        return dict.fromkeys(names) if self.role == DECODE else names

    def _backend_settings(self, decode_impl: str) -> dict[str, str]:
        if self.role == DRAFT_EXTEND:
            sglang_kernel.fused_fill()  # raises for older releases, which have other backends
        return {
            "attention_backend": "dsa",
            "dsa_prefill_backend": decode_impl,
            "dsa_decode_backend": decode_impl,
        }

    def _make_backend(self) -> Any:
        """As SGLang makes the backend of this role's graphs."""
        if self.index_kpool == 1 or self.device.type != "cpu":
            return self._made_by_sglang()
        with process_stubs.kpool_fusion():
            made = self._made_by_sglang()
        for backend in getattr(made, "attn_backends", [made]):
            backend.experimental_kpool_metadata_fusion = False
        return made

    def _made_by_sglang(self) -> Any:
        if self.role in (VERIFY, DECODE):
            self.model_runner.is_draft_worker = False
            return _target_backend(self.model_runner)
        if self.role == DRAFT_DECODE:
            return _multi_step_backend(self.model_runner, self.draft_tokens - 1)
        from sglang.srt.speculative.draft_utils import DraftBackendFactory

        arguments = {
            "draft_model_runner": self.model_runner,
            "topk": 1,
            "speculative_num_steps": self.draft_tokens - 1,
        }
        if "server_args" in process_stubs.parameters(DraftBackendFactory):
            arguments["server_args"] = self.server_args
        made = DraftBackendFactory(**arguments)._create_dsa_prefill_backend()
        return made[1] if isinstance(made, tuple) else made

    def init_state(self) -> None:
        """Allocate the graph buffers, as the runner does once before it captures."""
        with self.stub_process():
            self.backend.init_cuda_graph_state(self.max_bs, self.max_bs * self._rows_per_request())

    def capture_setup(self, bs: int) -> None:
        """Make the metadata of batch size bs, as the runner does before it captures that size."""
        with self.stub_process():
            self.backend.init_forward_metadata_out_graph(self.capture_batch(bs), in_capture=True)

    def capture_batch(self, bs: int) -> Any:
        """The ForwardBatch of a capture: the first bs entries of the static buffers."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        self._validate_bs(bs)
        seq_lens = self.inputs.seq_lens[:bs]
        return ForwardBatch(
            forward_mode=self._mode(),
            batch_size=bs,
            input_ids=self._tokens(bs),
            req_pool_indices=self.inputs.req_pool_indices[:bs],
            seq_lens=seq_lens,
            out_cache_loc=self._tokens(bs),
            seq_lens_sum=int(seq_lens.sum()),
            seq_lens_cpu=torch.full((bs,), self.inputs.shortest, dtype=torch.int64),
            extend_seq_lens=self._per_request(bs),
            extend_seq_lens_cpu=[self.draft_tokens] * bs,
            positions=self._tokens(bs),
            spec_info=self._spec_info(self.inputs.accept_lens[:bs]),
        )

    def replay_view(self, bs: int) -> SimpleNamespace:
        """The batch that a runner hands to the backend before a replay.

        It has no lengths on the host where SGLang needs none.
        Draft-extend's runner passes its whole static buffers, verify's and decode's new slices of them
        each time, and draft-decode's the batch's own tensors, which it has copied into its buffers, as
        draft-extend's has how many tokens are accepted.
        """
        self._validate_bs(bs)
        seq_lens, indices = self.inputs.seq_lens, self.inputs.req_pool_indices
        if self.role != DRAFT_EXTEND:
            seq_lens, indices = seq_lens[:bs], indices[:bs]
        if self.role == DRAFT_DECODE:
            seq_lens, indices = seq_lens.clone(), indices.clone()
        return SimpleNamespace(
            batch_size=bs,
            forward_mode=self._mode(),
            input_ids=self._tokens(bs),
            req_pool_indices=indices,
            seq_lens=seq_lens,
            seq_lens_sum=None,
            seq_lens_cpu=None if in_graph.is_generation() else seq_lens.to("cpu", copy=True),
            encoder_lens=None,
            out_cache_loc=self._tokens(bs),
            out_cache_loc_dsv4=None,
            spec_info=self._spec_info(self.inputs.accept_lens[:bs].clone()),
        )

    def replay(self, bs: int) -> None:
        """Calls the backend, with its hooks, as execute() does before a replay."""
        with self.stub_process():
            self.backend.init_forward_metadata_out_graph(self.replay_view(bs))

    def sglang_fill(self, bs: int) -> None:
        """SGLang's own fill into the metadata of batch size bs, without the hooks on the class."""
        if self._key(self.steps()[0], bs) not in self.steps()[0].decode_cuda_graph_metadata:
            raise ValueError(f"bs: call capture_setup({bs}) first, nothing is captured for {bs}")
        original = inspect.unwrap(type(self.backend).init_forward_metadata_out_graph)
        with self.stub_process():
            original(self.backend, self.replay_view(bs))
            if len(self.steps()) >= draft_decode.STEPS_REFRESHED:
                self._refresh_stale(bs)

    def _refresh_stale(self, bs: int) -> None:
        """What SGLang leaves as it was captured in the first draft steps, where there are many."""
        for step, metadata in zip(self.steps(), self.metadata(bs), strict=True):
            if metadata.paged_mqa_schedule_metadata is not None:
                mqa_schedule.refresh(step, metadata, metadata.paged_mqa_ctx_lens_2d)
            if getattr(metadata, "topk_v2_plan", None) is not None:
                plan = step._build_topk_v2_plan(metadata.dsa_seqlens_expanded)
                object.__setattr__(metadata, "topk_v2_plan", plan)

    def steps(self) -> list[Any]:
        """The DSA backends: one, and of draft-decode one for each draft step but the last."""
        if self.role == DRAFT_DECODE:
            return list(self.backend.attn_backends)
        return [self.backend]

    def metadata(self, bs: int) -> list[Any]:
        """SGLang's metadata objects of batch size bs, of each of :meth:`steps`."""
        steps = self.steps()
        return [step.decode_cuda_graph_metadata[self._key(step, bs)] for step in steps]

    def _key(self, step: Any, bs: int) -> Any:
        return fields.graph_key(step.decode_cuda_graph_metadata, bs, self._mode())

    def _mode(self) -> Any:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        return {
            DRAFT_EXTEND: ForwardMode.DRAFT_EXTEND_V2,
            DRAFT_DECODE: ForwardMode.DECODE,
            VERIFY: ForwardMode.TARGET_VERIFY,
            DECODE: ForwardMode.DECODE,
        }[self.role]

    def _rows_per_request(self) -> int:
        return 1 if self.role == DRAFT_DECODE else self.draft_tokens

    def _validate_bs(self, bs: int) -> None:
        if not 1 <= bs <= self.max_bs:
            raise ValueError(f"bs: must lie in 1..{self.max_bs}, the backend's max_bs, got {bs}")

    def _tokens(self, bs: int) -> torch.Tensor:
        """int64 zeros, one for each token of the batch: a field that a fill does not read."""
        return torch.zeros(bs * self.draft_tokens, dtype=torch.int64, device=self.device)

    def _per_request(self, bs: int) -> torch.Tensor:
        return torch.full((bs,), self.draft_tokens, dtype=torch.int32, device=self.device)

    def _spec_info(self, accept_lens: torch.Tensor) -> SimpleNamespace | None:
        if self.role == DECODE:
            return None
        return SimpleNamespace(
            num_accept_tokens=accept_lens,
            num_correct_drafts=accept_lens - 1,
            num_tokens_per_req=self.draft_tokens,
        )


def pooled(index_kpool: int) -> dict[str, Any]:
    """Arguments for a backend with a pooled index, which no server has with flashmla_kv."""
    if index_kpool == 1:
        return {}
    return {
        "index_kpool": index_kpool,
        "page_size": page_size_of(index_kpool),
        "decode_impl": "flashmla_sparse",
    }


def page_size_of(index_kpool: int) -> int:
    """The size of a server's page with 64 index keys, in tokens or, up to 0.5.21, in keys."""
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    in_tokens = hasattr(DeepseekSparseAttnBackend, "_kpool_index_page_size")
    return 64 * index_kpool if in_tokens else 64


def _target_backend(model_runner: Any) -> Any:
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    return DeepseekSparseAttnBackend(model_runner)


def _multi_step_backend(model_runner: Any, steps: int) -> Any:
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnMultiStepBackend

    return DeepseekSparseAttnMultiStepBackend(model_runner, 1, steps)
