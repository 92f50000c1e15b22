"""Draft-decode in its graph: one fill and one set of tensors for all draft steps.

SGLang's multi-step backend holds a DSA backend for each draft step but the last, and gives all of them
the same metadata: lengths and tables of the batch before its draft tokens. Here they share one metadata
object per batch size, which the graph fills before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_nsa_plugin.adapters import hooks, mqa_schedule, wide_tables
from sglang_nsa_plugin.adapters.adapter import Parts
from sglang_nsa_plugin.adapters.captured_fill import BackendFills
from sglang_nsa_plugin.adapters.hooks import Call, Hook, Sets
from sglang_nsa_plugin.adapters.roles import DRAFT_DECODE_ROLE
from sglang_nsa_plugin.adapters.supported import why_draft_decode_unsupported
from sglang_nsa_plugin.adapters.taken_over import (
    ATTRIBUTE,
    FAST_PATH,
    TAKEOVERS,
    consider,
    forget_graphs,
    leave_unknown_call,
    record,
)
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.state import DRAFT_DECODE, DRAFT_DECODE_STATE

# On the backend of every draft step but the first: the first, whose metadata it shares.
SHARES = "_nsa_shares_metadata_of"
# With more steps than these SGLang leaves the schedules of three of them as they were captured.
STEPS_REFRESHED = 3

_DSA = "sglang.srt.layers.attention.dsa_backend"
_BACKEND = f"{_DSA}.DeepseekSparseAttnBackend"
_MULTI_STEP = f"{_DSA}.DeepseekSparseAttnMultiStepBackend"
_MODE = "sglang.srt.model_executor.forward_batch_info.ForwardMode"


def _init(
    original: Callable[..., None], multi_step: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    original(multi_step, model_runner, *args, **kwargs)
    first = next(iter(multi_step.attn_backends), None)
    consider(multi_step, first, model_runner, DRAFT_DECODE_ROLE, why_draft_decode_unsupported)


def _init_cuda_graph_state(
    original: Callable[..., Any],
    multi_step: Any,
    max_bs: int,
    max_num_tokens: int,
    *more: Any,
    **named: Any,
) -> Any:
    fills = getattr(multi_step, ATTRIBUTE, None)
    for step in multi_step.attn_backends:
        vars(step).pop(SHARES, None)
    if fills is None:
        return original(multi_step, max_bs, max_num_tokens, *more, **named)
    forget_graphs(fills)
    first, *others = steps = multi_step.attn_backends
    for step in others:
        setattr(step, SHARES, first)
    # SGLang's fill of all steps, which reads a wide table, runs where this hook is out of force.
    drops = fills.drops_wide_tables and hooks.why_replaced(PARTS.hooks) is None
    with wide_tables.decided_without_speculation(steps if drops else ()):
        result = original(multi_step, max_bs, max_num_tokens, *more, **named)
    tables = len(others) + wide_tables.is_dropped(first)
    fills.count_saved(tables * wide_tables.bytes_of(first, max_num_tokens))
    return result


def share_metadata(backend: Any) -> None:
    """Drops the tensors that a draft step's backend has just allocated for those of the first step.

    To be called for every backend that allocates, so that no more than one set too many lives at a time.
    """
    first = getattr(backend, SHARES, None)
    if first is not None:
        backend.decode_cuda_graph_metadata = first.decode_cuda_graph_metadata


def _out_graph(
    original: Callable[..., Any],
    multi_step: Any,
    forward_batch: Any,
    in_capture: bool = False,
    *more: Any,
    **named: Any,
) -> Any:
    """Before a replay: points every draft step at the captured tensors, or lets SGLang fill.

    SGLang chooses between its attention kernels for prefill here, too; draft steps run none of them.
    """
    if more or named:
        return _unknown_call(original, multi_step, forward_batch, in_capture, *more, **named)
    fast_path = getattr(multi_step, FAST_PATH, None)
    hit = None if fast_path is None else fast_path.get(forward_batch.batch_size)
    if hit is not None and not in_capture:
        backend, req_to_token, metadata, count = hit
        if backend.req_to_token is req_to_token:
            if backend.forward_metadata is not metadata:  # the steps always share one object
                _point_steps_at(metadata, multi_step)
            count.replays += 1
            return None
    return _slow_path(original, multi_step, forward_batch, in_capture)


def _unknown_call(
    original: Callable[..., Any],
    multi_step: Any,
    forward_batch: Any,
    in_capture: bool,
    *more: Any,
    **named: Any,
) -> Any:
    def sglangs(multi_step: Any, forward_batch: Any) -> Any:
        return original(multi_step, forward_batch, in_capture, *more, **named)

    leave_unknown_call(multi_step, in_capture)
    if in_capture:
        return sglangs(multi_step, forward_batch)
    return _plan_by_sglang(sglangs, multi_step, forward_batch)


def _slow_path(
    original: Callable[..., Any], multi_step: Any, forward_batch: Any, in_capture: bool
) -> Any:
    fills = getattr(multi_step, ATTRIBUTE, None)
    if in_capture:
        if fills is not None:
            fills.drop_last_check()
        return original(multi_step, forward_batch, in_capture=True)
    abandon = TAKEOVERS[DRAFT_DECODE].abandon
    if fills is None or not attempt(_serve, abandon, fills, multi_step, forward_batch):
        _plan_by_sglang(original, multi_step, forward_batch)
    return None


def _serve(fills: BackendFills, multi_step: Any, forward_batch: Any) -> bool:
    """Validates a batch; False leaves it to SGLang."""
    shadowed = fills.shadowed
    if shadowed is not None:
        attempt(shadowed.compare_last, shadowed.check.stop)
    captured = fills.captured.get(forward_batch.batch_size)
    if captured is None or not fills.validate(captured, forward_batch):
        return False
    _point_steps_at(captured.metadata, multi_step)
    DRAFT_DECODE_STATE.count.replays += 1
    if shadowed is not None:
        attempt(shadowed.fill_ahead, shadowed.check.stop, forward_batch, _plan_one_step)
    return True


def _plan_by_sglang(original: Callable[..., Any], multi_step: Any, forward_batch: Any) -> None:
    """SGLang's own fill, into the metadata that the draft steps share if a fill was set up."""
    first = next(iter(multi_step.attn_backends), None)
    metadata = first and _metadata_of(first, forward_batch)
    if metadata is not None and metadata.page_table_1 is None:
        # SGLang's fill of all steps copies a wide table, of one step it can do without.
        _plan_each_step(multi_step, forward_batch)
        return
    original(multi_step, forward_batch)
    if multi_step.speculative_num_steps > STEPS_REFRESHED and metadata is not None:
        _refresh_schedule(multi_step, metadata)


def _plan_each_step(multi_step: Any, forward_batch: Any) -> None:
    """Once for all steps that share their metadata, as they do unless a hook of ours was replaced."""
    planned: list[Any] = []
    for step in multi_step.attn_backends:
        metadata = _metadata_of(step, forward_batch)
        if not any(metadata is each for each in planned):
            _plan_one_step(step, forward_batch)
            planned.append(metadata)
        step.forward_metadata = metadata


def _metadata_of(backend: Any, forward_batch: Any) -> Any | None:
    """By ``fields.graph_key``, without a call that could fail; None where none is captured."""
    table, bs = backend.decode_cuda_graph_metadata, forward_batch.batch_size
    return table.get((bs, forward_batch.forward_mode), table.get(bs))


def _point_steps_at(metadata: Any, multi_step: Any) -> None:
    for step in multi_step.attn_backends:
        step.forward_metadata = metadata


def _refresh_schedule(multi_step: Any, metadata: Any) -> None:
    """What SGLang leaves out with so many steps: its schedule of capture would be the last replay's."""
    first, *others = multi_step.attn_backends
    is_shared = any(getattr(step, SHARES, None) is first for step in others)
    if is_shared and metadata.paged_mqa_schedule_metadata is not None:
        mqa_schedule.refresh(first, metadata, metadata.paged_mqa_ctx_lens_2d)


def _plan_one_step(backend: Any, forward_batch: Any) -> None:
    """SGLang's own fill of a backend in decode."""
    (mode,) = DRAFT_DECODE_ROLE.modes()
    backend._apply_cuda_graph_metadata(
        bs=forward_batch.batch_size,
        req_pool_indices=forward_batch.req_pool_indices,
        seq_lens=forward_batch.seq_lens,
        seq_lens_cpu=forward_batch.seq_lens_cpu,
        forward_mode=mode,
        spec_info=None,
    )


PARTS = Parts(
    hooks=(
        Hook(
            f"{_MULTI_STEP}.__init__",
            ("self", "model_runner", "topk", "speculative_num_steps"),
            _init,
            and_more=True,
        ),
        Hook(
            f"{_MULTI_STEP}.init_cuda_graph_state",
            ("self", "max_bs", "max_num_tokens"),
            _init_cuda_graph_state,
        ),
        Hook(
            f"{_MULTI_STEP}.init_forward_metadata_out_graph",
            ("self", "forward_batch", "in_capture"),
            _out_graph,
        ),
        Hook(f"{_MULTI_STEP}.init_forward_metadata_in_graph", ("self", "forward_batch"), record),
    ),
    needs=(
        Call(
            f"{_BACKEND}._apply_cuda_graph_metadata",
            (
                "self",
                "bs",
                "req_pool_indices",
                "seq_lens",
                "seq_lens_cpu",
                "forward_mode",
                "spec_info",
            ),
        ),
        Call(f"{_MODE}.is_decode", ("self",)),
        Sets(f"{_MULTI_STEP}.__init__", ("attn_backends", "topk", "speculative_num_steps")),
    ),
)
