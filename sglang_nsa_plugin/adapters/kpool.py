"""What the in-graph adapter adds for models that pool the keys of their index (``index_kpool``).

Their metadata is filled in two parts: what all models have, and then lengths that count k-pools, the
plan of the keys that a step writes, and a page table of the index; ``kpool_args.py`` has the formulas.
The plugin covers what SGLang's own fused kernels cover, in 0.5.20 to 0.5.23.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import fields, hooks, mqa_schedule
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Requirement
from sglang_nsa_plugin.adapters.roles import Role
from sglang_nsa_plugin.kpool_args import KPoolArgs
from sglang_nsa_plugin.state import DRAFT_DECODE, DRAFT_EXTEND, VERIFY

ROLES_COVERED = (DRAFT_DECODE, VERIFY, DRAFT_EXTEND)
PAGE_SIZE = 64  # k-pools in a page of the index
LONGEST = 40_960  # k-pools, of a request whose schedule is compared with SGLang's at the start

_ATTENTION = "sglang.srt.layers.attention"
_METADATA = f"{_ATTENTION}.dsa_backend.DSAMetadata"
_PLAN = f"{_ATTENTION}.dsa.kpool_plan"
_SCHEDULE = f"{_PLAN}._compute_pool_schedule_metadata"
_MIXIN = f"{_ATTENTION}.dsa.dsa_backend_kpool.DeepseekSparseAttnBackendKPoolMixin"
_DRAFT_EXTEND_INPUT = "sglang.srt.speculative.eagle_info.EagleDraftExtendInput"
_TOPK_PLAN = f"{_ATTENTION}.dsa.kpool_fp8_index.refresh_kpool_topk_v2_plan"


def is_pooled(backend: Any) -> bool:
    """Whether the model has one index key for several tokens. SGLang knows such models since 0.5.20."""
    return bool(getattr(backend, "dsa_index_kpool", 1) > 1)


def why_unsupported(backend: Any, server_args: Any, role: Role) -> str | None:
    """Why a backend with a pooled index stays with SGLang, or None when the plugin covers it."""
    what = f"index k-pooling ({backend.dsa_index_kpool})"
    if role.name not in ROLES_COVERED:
        return f"{what} is not supported for {role.name}"
    misfits = hooks.misfits(_needs(backend))
    if misfits:
        return f"this SGLang does not fit the fill of {what}: {'; '.join(misfits)}"
    if not getattr(backend, "experimental_kpool_metadata_fusion", False):
        return (
            f"{what} is not supported without SGLang's fused metadata "
            "(SGLANG_EXPERIMENTAL_DSA_KPOOL_METADATA_FUSION, and a geometry that it covers)"
        )
    if getattr(server_args, "dcp_size", 1) > 1:
        return (
            f"{what} is not supported with decode context parallelism (dcp_size {server_args.dcp_size})"
        )
    page_size = _index_page_size(backend)
    if page_size != PAGE_SIZE:
        return (
            f"{what} is not supported with {page_size} k-pools in a page of the index, only {PAGE_SIZE}"
        )
    return None


class KPoolFill:
    """The k-pooling part of the fills of one backend.

    Attributes:
        bind: the implementation's.
        remainder_last: of DeepGEMM's schedule of the k-pools; None leaves that schedule to SGLang.
    """

    def __init__(
        self, backend: Any, role: Role, bind: Callable[[KPoolArgs], Callable[[], None]] | None
    ) -> None:
        assert bind is not None  # of an implementation that was chosen for a pooled index
        self.bind = bind
        self.remainder_last = remainder_last(backend, bind)
        self._backend = backend
        self._role = role
        # Whether the runner copies the numbers of accepted tokens; None until a batch has shown it.
        self._is_copied: bool | None = None

    def args(self, batch: Any, metadata: Any, enabled: torch.Tensor) -> KPoolArgs:
        """The k-pooling fill of a batch size, from the batch of its capture."""
        backend, k = self._backend, self._backend.dsa_index_kpool
        draft_tokens = backend.speculative_num_draft_tokens
        outputs = fields.read_kpool(metadata)
        if self.remainder_last is None:
            outputs.pop("kpool_schedule", None)
        return KPoolArgs(
            seq_lens=batch.seq_lens,
            req_pool_indices=batch.req_pool_indices,
            req_to_token=backend.req_to_token,
            extend_lens=self._role.rows_per_request(draft_tokens),
            length_offset=self._role.length_offset(draft_tokens),
            accept_lens=batch.spec_info.num_accept_tokens if "write_counts" in outputs else None,
            index_kpool=k,
            index_topk=backend.dsa_index_topk,
            page_size=PAGE_SIZE,
            server_page_size=PAGE_SIZE * k if _numbers_server_pages(backend) else PAGE_SIZE,
            **outputs,
            mqa_remainder_last=bool(self.remainder_last),
            enabled=enabled,
        )

    def serves(self, args: KPoolArgs, batch: Any) -> bool:
        """Whether the captured tensor holds how many tokens of this batch are accepted.

        Draft-extend's runner copies the accepted tokens of a batch into its buffer if the batch has its
        correct drafts, too. It passes that buffer of a padded batch, else the batch's own tensor.
        Whether it copies is found out with the first tensor of a batch's own. The host waits for the
        device that once.
        """
        if args.accept_lens is None:
            return True
        given = getattr(batch.spec_info, "num_accept_tokens", None)
        if given is None or getattr(batch.spec_info, "num_correct_drafts", None) is None:
            return False
        if given.data_ptr() == args.accept_lens.data_ptr():
            return True
        if self._is_copied is None:
            self._is_copied = torch.equal(given, args.accept_lens)
        return self._is_copied

    def refresh_derived(self, metadata: Any) -> None:
        """Runs SGLang's own functions for the tables that the fill does not write."""
        kpool_seqlens = fields.first_of(metadata, fields.KPOOL["kpool_seqlens"])
        schedule = fields.first_of(metadata, fields.KPOOL["kpool_schedule"])
        if schedule is not None and self.remainder_last is None:
            schedule.copy_(_schedule_of_sglang(self._backend, kpool_seqlens))
        plan = fields.first_of(metadata, fields.KPOOL_TOPK_PLAN)
        if plan is not None:  # since 0.5.23
            _of_sglang(_TOPK_PLAN)(plan=plan, pool_lens=kpool_seqlens)


def remainder_last(backend: Any, bind: Callable[[KPoolArgs], Callable[[], None]]) -> bool | None:
    """The ``mqa_remainder_last`` with which ``bind`` makes SGLang's schedule of k-pools.

    None where neither way does, and where SGLang makes none: on the CPU, and without DeepGEMM.
    """
    batches = mqa_schedule.probes(backend.req_to_token.device, LONGEST)
    theirs = [(lengths, _schedule_of_sglang(backend, lengths)) for lengths in batches]
    if any(schedule is None for _, schedule in theirs):
        return None
    return mqa_schedule.remainder_of(theirs, functools.partial(_schedule, bind))


def _schedule(
    bind: Callable[[KPoolArgs], Callable[[], None]],
    lengths: torch.Tensor,
    like: torch.Tensor,
    last: bool,
) -> torch.Tensor:
    """What a fill makes of requests with so many k-pools, of two tokens each."""
    bs, schedule = lengths.shape[0], torch.full_like(like, -1)
    int32 = [torch.empty(bs + 1, dtype=torch.int32, device=lengths.device) for _ in range(5)]
    lengths_out, sums, write_start, tail_start, kpool_seqlens = int32
    bind(
        KPoolArgs(
            seq_lens=lengths * 2,
            req_pool_indices=torch.zeros_like(lengths),
            req_to_token=torch.zeros(1, 1, dtype=torch.int32, device=lengths.device),
            extend_lens=1,
            index_kpool=2,
            index_topk=2,
            server_page_size=PAGE_SIZE,
            nsa_cache_seqlens=lengths_out[:bs],
            nsa_cu_seqlens_k=sums,
            write_requests=torch.empty(bs, dtype=torch.int64, device=lengths.device),
            write_start=write_start[:bs],
            tail_start=tail_start[:bs],
            write_locs=torch.empty(bs, 1, dtype=torch.int64, device=lengths.device),
            kpool_seqlens=kpool_seqlens[:bs],
            kpool_schedule=schedule,
            mqa_remainder_last=last,
        )
    )()
    return schedule


def _schedule_of_sglang(backend: Any, kpool_seqlens: torch.Tensor) -> Any:
    return _of_sglang(_SCHEDULE)(kpool_seqlens, **{_page_size_name(backend): PAGE_SIZE})


def _of_sglang(target: str) -> Callable[..., Any]:
    module, name = target.rsplit(".", 1)
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _needs(backend: Any) -> list[Requirement]:
    """What SGLang must have for a pooled index, besides what every model needs."""
    names = {path for paths in fields.KPOOL.values() for path in paths}
    needs: list[Requirement] = [
        Fields(_METADATA, tuple(sorted({name.split(".")[0] for name in names}))),
        Fields(
            f"{_PLAN}.KPoolWritePlan",
            tuple(sorted(name.split(".")[1] for name in names if "." in name)),
        ),
        Call(_SCHEDULE, ("pool_seqlens", _page_size_name(backend))),
        Call(f"{_MIXIN}._kpool_{_page_size_name(backend)}", ("self",)),
        Fields(_DRAFT_EXTEND_INPUT, ("num_accept_tokens", "num_correct_drafts")),
    ]
    has_topk_plan = not hooks.misfits([Fields(_METADATA, fields.KPOOL_TOPK_PLAN[:1])])
    return [*needs, Call(_TOPK_PLAN, ("plan", "pool_lens"))] if has_topk_plan else needs


def _numbers_server_pages(backend: Any) -> bool:
    """Whether a page of the index has the number of a server page of k times as many tokens.

    Since 0.5.22, where the size of a page of the index has its name of today.
    """
    return hasattr(backend, "_kpool_index_page_size")


def _page_size_name(backend: Any) -> str:
    return "index_page_size" if _numbers_server_pages(backend) else "slots_per_page"


def _index_page_size(backend: Any) -> int:
    if _numbers_server_pages(backend):
        return int(backend._kpool_index_page_size())
    return int(backend._kpool_slots_per_page())
