"""SGLang's backend in a stub process: what is the same for all releases."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

import torch

from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.harness.inputs import Inputs, make_inputs, table_width


class HarnessBackend(ABC):
    """SGLang's own draft-extend backend around a minimal model runner: no server, no model.

    SGLang's code makes ``backend``, so hooks on it run. Making one replaces this process's SGLang
    configuration by these settings and ``server_args``.

    Args:
        inputs: of another HarnessBackend, to compare two backends on one batch; None makes new ones.
        index_kpool: the model's pooling of indexer keys, which 0.5.20 and later know.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        max_bs: int = 8,
        draft_tokens: int = 4,
        context_len: int = 4096,
        pool_size: int = 32,
        page_size: int = 64,
        index_topk: int = 2048,
        decode_impl: str = "flashmla_sparse",
        index_kpool: int = 1,
        inputs: Inputs | None = None,
        **server_args: Any,
    ) -> None:
        self.device = torch.device(device)
        self.draft_tokens = draft_tokens
        self.index_topk = index_topk
        self.page_size = page_size
        self.index_kpool = index_kpool
        process_stubs.validate_device(self.device, decode_impl)
        if inputs is not None and inputs.page_size != page_size:
            raise ValueError(f"inputs: page_size must be {page_size}, got {inputs.page_size}")
        if inputs is None:
            width = table_width(context_len, draft_tokens, page_size)
            shortest = self._shortest()
            inputs = make_inputs(self.device, max_bs, pool_size, width, page_size, shortest)
        self.inputs = inputs
        self.max_bs = inputs.max_bs
        self.server_args = process_stubs.publish_server_args(
            page_size=page_size,
            **self._speculation(),
            **self._backend_settings(decode_impl),
            **server_args,
        )
        self.model_runner = process_stubs.model_runner(
            self.device,
            self.server_args,
            inputs,
            context_len,
            page_size,
            index_topk,
            decode_impl,
            index_kpool,
        )
        with self.stub_process():
            self.backend = self._make_backend()

    @property
    def longest(self) -> int:
        """How many tokens a request may have: as many as ``req_to_token`` has columns."""
        return self.inputs.req_to_token.shape[1]

    def _shortest(self) -> int:
        """How many tokens a request has at least."""
        return 1

    def _speculation(self) -> dict[str, Any]:
        """The server arguments of speculative decoding."""
        return {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": self.draft_tokens - 1,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": self.draft_tokens,
        }

    @abstractmethod
    def stub_process(self) -> contextlib.AbstractContextManager[None]:
        """To be entered around calls of SGLang's code. On CUDA it changes only the topology."""

    @abstractmethod
    def _backend_settings(self, decode_impl: str) -> dict[str, str]:
        """The server arguments that choose the attention backend, under this release's names."""

    @abstractmethod
    def _make_backend(self) -> Any:
        """Makes the backend of :attr:`model_runner` by SGLang's own code."""
