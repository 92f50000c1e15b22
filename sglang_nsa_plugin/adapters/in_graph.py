"""SGLang 0.5.15 to 0.5.23: fills are recorded inside the captured graphs of a speculative step.

At capture a runner calls ``init_forward_metadata_in_graph`` on its backend, which DSA leaves empty.
The fill, and the tables that SGLang derives from it, are recorded there. At replay
``forward_metadata`` is pointed at the captured tensors; the host launches nothing for metadata, and at
most one empty kernel before the target's graph.

This module has draft-extend, verify and plain decode, whose backends are the same class of SGLang's;
draft-decode is in :mod:`draft_decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import draft_decode, fields, hooks, wide_tables
from sglang_nsa_plugin.adapters.adapter import Adapter, Parts
from sglang_nsa_plugin.adapters.captured_fill import BackendFills
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook, Sets
from sglang_nsa_plugin.adapters.no_op import LAST_DRAFT_EXTEND
from sglang_nsa_plugin.adapters.roles import DECODE_ROLE, DRAFT_EXTEND_ROLE, VERIFY_ROLE
from sglang_nsa_plugin.adapters.supported import (
    fence_event,
    speculative_algorithm,
    why_decode_unsupported,
    why_draft_extend_unsupported,
    why_verify_unsupported,
)
from sglang_nsa_plugin.adapters.taken_over import (
    ATTRIBUTE,
    FAST_PATH,
    NAME,
    TAKEOVERS,
    consider,
    does_without_wide_tables,
    forget_graphs,
    leave_unknown_call,
    record,
    why_unfilled,
)
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.state import DECODE, DRAFT_DECODE, DRAFT_EXTEND, VERIFY

_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_BACKEND = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
_METADATA = "sglang.srt.layers.attention.dsa_backend.DSAMetadata"
_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info"
_RUNNER = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner"


def _create_backend(original: Callable[..., Any], factory: Any, *more: Any, **named: Any) -> Any:
    """The factory's product is the one backend that draft-extend graphs are captured with."""
    product = original(factory, *more, **named)
    backend = product[1] if isinstance(product, tuple) else product
    runner = factory.draft_model_runner
    consider(backend, backend, runner, DRAFT_EXTEND_ROLE, why_draft_extend_unsupported)
    return product


def _init_backend(
    original: Callable[..., None], backend: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """The target's backend makes the metadata of verify or plain decode; the draft model's do not."""
    original(backend, model_runner, *args, **kwargs)
    consider_target(backend, model_runner)


def consider_target(backend: Any, model_runner: Any) -> None:
    """Takes the backend over that has just been made, if it is the target's."""
    if getattr(model_runner, "is_draft_worker", True) or backend.speculative_num_steps:
        return
    if speculative_algorithm(model_runner.server_args) is None:
        consider(backend, backend, model_runner, DECODE_ROLE, why_decode_unsupported)
    else:
        consider(backend, backend, model_runner, VERIFY_ROLE, why_verify_unsupported)


def _init_cuda_graph_state(
    original: Callable[..., Any],
    backend: Any,
    max_bs: int,
    max_num_tokens: int,
    *more: Any,
    **named: Any,
) -> Any:
    fills = getattr(backend, ATTRIBUTE, None)
    drops = does_without_wide_tables(backend)
    if fills is not None:
        forget_graphs(fills)
    with wide_tables.decided_without_speculation([backend] if drops else ()):
        result = original(backend, max_bs, max_num_tokens, *more, **named)
    if fills is None:
        draft_decode.share_metadata(backend)
        return result
    dropped = drops and wide_tables.is_dropped(backend)
    fills.count_saved(wide_tables.bytes_of(backend, max_num_tokens) if dropped else 0)
    return result


def _out_graph(
    original: Callable[..., Any],
    backend: Any,
    forward_batch: Any,
    in_capture: bool = False,
    *more: Any,
    **named: Any,
) -> Any:
    """Before a replay: points the backend at the captured tensors, or lets SGLang fill.

    The fast path is inline and compares objects by identity; of verify and decode, whose runner cuts new
    slices from its buffers for each replay, addresses. Between two replays other work evicts the CPU's
    caches, so each function called from here would cost some 0.2 µs, and each object touched some
    0.1 µs. Memory that moved under the same tensor object is not looked for: comparing three addresses
    would cost 2 µs, no release of SGLang moves memory, and the shadow check validates every replay.
    """
    if more or named:
        leave_unknown_call(backend, in_capture)
        return original(backend, forward_batch, in_capture, *more, **named)
    fast_path = getattr(backend, FAST_PATH, None)
    if fast_path is None:  # first: all other backends' steps come here, too
        return original(backend, forward_batch, in_capture=in_capture)
    hit = fast_path.get(forward_batch.batch_size)
    if hit is not None:
        mode, seq_lens, req_pool_indices, are_slices, req_to_token, metadata, count, no_op = hit
        if (
            forward_batch.forward_mode is mode
            and (
                (
                    forward_batch.seq_lens.data_ptr() == seq_lens
                    and forward_batch.req_pool_indices.data_ptr() == req_pool_indices
                )
                if are_slices
                else (
                    forward_batch.seq_lens is seq_lens
                    and forward_batch.req_pool_indices is req_pool_indices
                )
            )
            and backend.req_to_token is req_to_token
            and not backend.use_mha
            and not in_capture
        ):
            backend.forward_metadata = metadata
            count.replays += 1
            if no_op is not None:
                no_op.replays_left -= 1
                if no_op.replays_left < 0:
                    no_op.launch_if_busy()
            return None
    return _slow_path(original, backend, forward_batch, in_capture)


def _slow_path(original: Callable[..., Any], backend: Any, forward_batch: Any, in_capture: bool) -> Any:
    """SGLang fills what the plugin does not serve, and after an error of the plugin every step."""
    fills: BackendFills = getattr(backend, ATTRIBUTE)
    if in_capture:
        fills.drop_last_check()
        return original(backend, forward_batch, in_capture=True)
    abandon = TAKEOVERS[fills.role.name].abandon
    if not attempt(_serve, abandon, fills, forward_batch, original):
        return original(backend, forward_batch, in_capture=in_capture)
    return None


def _serve(fills: BackendFills, forward_batch: Any, original: Callable[..., Any]) -> bool:
    """Validates a batch whose objects are new, or whose replay has more to do; False leaves it alone."""
    backend, shadowed = fills.backend, fills.shadowed
    if shadowed is not None:
        attempt(shadowed.compare_last, shadowed.check.stop)
    if forward_batch.forward_mode is not fills.mode:
        return False
    captured = fills.captured.get(forward_batch.batch_size)
    if captured is None or not fills.validate(captured, forward_batch):
        return False
    # Called only where it can change something: it takes longer than the rest of a replay.
    if backend.use_mha or backend.enable_auto_select_prefill_impl:
        backend.set_dsa_prefill_impl(forward_batch=None)
    backend.forward_metadata = captured.metadata
    fills.role.state.count.replays += 1
    if shadowed is not None:
        plan = shadowed.plan if fills.role.ends_step else shadowed.fill_ahead
        attempt(plan, shadowed.check.stop, forward_batch, original)
    if fills.no_op is not None:
        fills.no_op.before_replay()
    return True


def _execute(original: Callable[..., Any], runner: Any, *batch: Any, **more: Any) -> Any:
    """Publishes the event after which the scheduler may overwrite ``req_to_token``.

    Up to 0.5.21 SGLang publishes an event recorded before the replay, after which its own fill is done:
    too early for a fill in the graph. Later releases publish none for DSA, and the scheduler waits for
    the whole forward. After the fill the draft model reads only the tables that it wrote. SGLang's
    target-verify publishes an event from inside the graph in the same way.
    """
    output = original(runner, *batch, **more)
    error = attempt(_publish_read_done, _itself, runner)
    if error is not None:
        # The scheduler waits for the whole forward then, and does not overwrite what the graph reads.
        _set_fence(runner.model_runner, None)
        TAKEOVERS[DRAFT_EXTEND].abandon(error)
    return output


def _itself(error: Exception) -> Exception | None:
    return error


def _publish_read_done(runner: Any) -> None:
    fills = getattr(runner.draft_extend_attn_backend, ATTRIBUTE, None)
    read_done = None if fills is None else fills.read_done(runner.bs)
    LAST_DRAFT_EXTEND.fill_done = read_done
    if read_done is not None:
        model_runner = runner.model_runner
        # SGLang's KV canary, a debugging aid, reads req_to_token in the graph after the fill.
        has_canary = getattr(model_runner, "canary_manager", None) is not None
        _set_fence(model_runner, None if has_canary else read_done)


def _set_fence(model_runner: Any, event: torch.cuda.Event | None) -> None:
    name = fence_event(model_runner)
    assert name is not None  # required when the backend was taken over
    setattr(model_runner, name, event)


# Each hook goes when SGLang's DSA backend records its own fills in the graphs.
_STEP_HOOKS = (
    Hook(
        f"{_BACKEND}.init_cuda_graph_state",
        ("self", "max_bs", "max_num_tokens"),
        _init_cuda_graph_state,
    ),
    Hook(
        f"{_BACKEND}.init_forward_metadata_out_graph",
        ("self", "forward_batch", "in_capture"),
        _out_graph,
    ),
    Hook(f"{_BACKEND}.init_forward_metadata_in_graph", ("self", "forward_batch"), record),
)
_HOOKS = (
    Hook(f"{_FACTORY}._create_dsa_prefill_backend", ("self",), _create_backend),
    Hook(f"{_BACKEND}.__init__", ("self", "model_runner"), _init_backend, and_more=True),
    *_STEP_HOOKS,
    Hook(f"{_RUNNER}.execute", ("self", "forward_batch"), _execute, and_more=True),
)
_NEEDS = (
    Call(f"{_BACKEND}.set_dsa_prefill_impl", ("self", "forward_batch")),
    Call(f"{_BACKEND}._refresh_paged_mqa_schedule_metadata", ("self", "metadata", "seqlens_32_2d")),
    Call(f"{_BACKEND}._build_topk_v2_plan", ("self", "seqlens_expanded")),
    Call(f"{_BACKEND}._compute_flashmla_metadata", ("self", "cache_seqlens", "seq_len_q")),
    Fields(
        _METADATA,
        ("page_size", *fields.DSA.values(), fields.TOPK_PLAN, fields.FLASHMLA),
    ),
    Call(f"{_FORWARD_BATCH}.ForwardMode.is_draft_extend_v2", ("self",)),
    Call(f"{_FORWARD_BATCH}.ForwardMode.is_target_verify", ("self",)),
    Fields(
        f"{_FORWARD_BATCH}.ForwardBatch",
        ("forward_mode", "batch_size", "seq_lens", "req_pool_indices"),
    ),
    Sets(f"{_FACTORY}.__init__", ("draft_model_runner",)),
    Sets(_BACKEND, ("decode_cuda_graph_metadata",)),
    Sets(_RUNNER, ("draft_extend_attn_backend", "model_runner", "bs")),
)
_LAYS_OUT = Call(
    f"{_BACKEND}._build_paged_mqa_schedule_2d_ctx_lens",
    ("self", "forward_mode", "cache_seqlens_int32", "seqlens_expanded", "batch_size"),
)
# SGLang 0.5.13 and 0.5.14 have graphs of draft-decode and verify, and none of draft-extend, which the
# eager adapter fills. Its hook on the backend's constructor calls `consider_target`.
BEFORE_0_5_15 = {
    VERIFY: Parts(
        _STEP_HOOKS,
        (
            Call(f"{_FORWARD_BATCH}.ForwardMode.is_target_verify", ("self",)),
            _LAYS_OUT,
            Sets(_BACKEND, ("decode_cuda_graph_metadata",)),
        ),
    ),
    DRAFT_DECODE: Parts((*draft_decode.PARTS.hooks, *_STEP_HOOKS), draft_decode.PARTS.needs),
}

ADAPTER = Adapter(
    NAME,
    Parts(_HOOKS, _NEEDS),
    TAKEOVERS,
    why_unfilled,
    parts={DRAFT_DECODE: draft_decode.PARTS, VERIFY: Parts(needs=(_LAYS_OUT,))},
    untried={DECODE: "on a GPU, only SGLang 0.5.23 has served with decode filled"},
)


def is_generation() -> bool:
    """Whether this SGLang captures DSA's draft-extend in CUDA graphs, as 0.5.15 and later do.

    The top-k plan came with the graphs. Where it is missing for another reason, the eager adapter does
    not fit either, and says what is missing.
    """
    return not hooks.misfits([Fields(_METADATA, (fields.TOPK_PLAN,))])
