"""SGLang 0.5.15 to 0.5.23: the fill is recorded inside the captured draft-extend graph.

At capture the runner calls ``init_forward_metadata_in_graph`` on its backend, which DSA leaves empty:
there the fill and the tables that SGLang derives from it are recorded. At replay only
``forward_metadata`` is pointed at the captured tensors; the host launches nothing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.captured_fill import BackendFills, is_capturing
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook, Sets
from sglang_nsa_plugin.adapters.outcome import (
    START_ERRORS,
    CaptureError,
    decline,
    decline_after,
    take_over,
)
from sglang_nsa_plugin.adapters.server_config import resolved
from sglang_nsa_plugin.state import STATE

NAME = "in-graph"
ATTRIBUTE = "_nsa_draft_extend_fill"  # on a backend whose draft-extend fill is ours
READY = "_nsa_draft_extend_ready"  # on the same one: its fill's `ready`
RETIRED = "_nsa_retired_fill"  # on one that was handed back
# The name of the event that frees req_to_token for the scheduler, from 0.5.18 on and before.
FENCE_EVENTS = ("shared_read_done_event", "war_fastpath_read_done_event")
# Set by the backend's constructor, so no class can be asked for them.
BACKEND_ATTRIBUTES = (
    "req_to_token",
    "dsa_index_topk",
    "speculative_num_draft_tokens",
    "use_mha",
    "enable_auto_select_prefill_impl",
)

_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_BACKEND = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
_METADATA = "sglang.srt.layers.attention.dsa_backend.DSAMetadata"
_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info"
_RUNNER = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner"


def _create_backend(original: Callable[..., Any], factory: Any) -> Any:
    """The factory's product is the one backend that draft-extend graphs are captured with."""
    product = original(factory)
    if _asked_for is None:
        return product
    backend = product[1] if isinstance(product, tuple) else product
    refusal = uncovered(backend, factory.draft_model_runner)
    if refusal is None:
        _take_over(backend, _asked_for)
    else:
        decline(_asked_for, refusal)
    return product


def _take_over(backend: Any, asked_for: str) -> None:
    try:
        choice = dispatch.choose(asked_for, backend.req_to_token.device)
        (mode,) = _draft_extend_modes()
        fill = BackendFills(backend, mode, choice, _check_every)
    except START_ERRORS as error:
        _give_up(error)
        return
    setattr(backend, ATTRIBUTE, fill)
    setattr(backend, READY, fill.ready)
    _taken_over.add(backend)
    take_over(choice, fill.remainder_last is not None)


def _give_up(error: Exception) -> None:
    """Hands every backend back to SGLang, or ends the start where the fill was asked for by name."""
    global _asked_for
    assert _asked_for is not None  # nothing is taken over before
    decline_after(_asked_for, error)
    _asked_for = None
    for backend in list(_taken_over):
        hand_back(backend)


def hand_back(backend: Any) -> None:
    """SGLang fills this backend from now on, whatever graphs of it were captured."""
    _taken_over.discard(backend)
    vars(backend).pop(READY, None)
    fill = vars(backend).pop(ATTRIBUTE, None)
    if fill is not None:
        fill.retire()
        setattr(backend, RETIRED, fill)  # graphs hold its addresses


def uncovered(backend: Any, model_runner: Any) -> str | None:
    """Why this configuration stays with SGLang, or None when the adapter covers it."""
    missing = [name for name in BACKEND_ATTRIBUTES if not hasattr(backend, name)]
    if missing:
        return f"{type(backend).__name__} has no attribute {', '.join(missing)}"
    if _fence_event(model_runner) is None:
        return f"the model runner has none of {', '.join(FENCE_EVENTS)}, which the scheduler waits on"
    modes = _draft_extend_modes()
    if len(modes) != 1:
        names = ", ".join(mode.name for mode in modes) or "none"
        return f"one ForwardMode must be draft-extend, got {names}"
    server_args = resolved(model_runner.server_args)
    if torch.version.hip is not None:
        return "HIP is not covered"
    if getattr(server_args, "enable_multi_layer_eagle", False):
        return "the multi-layer EAGLE runner is not covered"
    if getattr(backend, "dsa_index_kpool", 1) > 1:
        return f"index k-pooling ({backend.dsa_index_kpool}) is not covered"
    graphs = getattr(server_args, "cuda_graph_config", None)
    if graphs is not None and graphs.decode.backend not in ("full", "disabled"):
        return f"{graphs.decode.backend} CUDA graphs are not covered, only full ones"
    return None


def _draft_extend_modes() -> list[Any]:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return [mode for mode in ForwardMode if mode.is_draft_extend_v2()]


def _init_cuda_graph_state(
    original: Callable[..., Any], backend: Any, max_bs: int, max_num_tokens: int
) -> Any:
    fill = getattr(backend, ATTRIBUTE, None)
    if fill is None:
        return original(backend, max_bs, max_num_tokens)
    fill.forget()
    with _as_without_speculation(backend):
        return original(backend, max_bs, max_num_tokens)


@contextlib.contextmanager
def _as_without_speculation(backend: Any) -> Iterator[None]:
    """SGLang leaves out the token-wide page table where nothing reads it, but never with speculation.

    That is for backends whose graphs hold target-verify or draft-decode. Those of draft-extend read it
    no more than decode graphs do: all other conditions, the top-k's kernel among them, stay SGLang's.
    """
    draft_tokens = backend.speculative_num_draft_tokens
    backend.speculative_num_draft_tokens = None
    try:
        yield
    finally:
        backend.speculative_num_draft_tokens = draft_tokens


def _out_graph(
    original: Callable[..., Any], backend: Any, forward_batch: Any, in_capture: bool = False
) -> Any:
    """Before a replay: points the backend at the captured tensors, or has SGLang fill.

    One function that looks at one tuple: other work takes all of the CPU's caches between two replays,
    so that each function called from here would cost some 0.2 µs, and each object on the way some 0.1.
    Memory that moved under the same tensor object is not looked for: three addresses would cost 2 µs, no
    release of SGLang moves it, and with the shadow check on, every replay is admitted anew.
    """
    ready = getattr(backend, READY, None)  # first: every step of every other backend comes by
    if ready is None:
        return original(backend, forward_batch, in_capture=in_capture)
    known = ready.get(forward_batch.batch_size)
    if known is not None:
        mode, seq_lens, req_pool_indices, req_to_token, metadata = known
        if (
            forward_batch.forward_mode is mode
            and forward_batch.seq_lens is seq_lens
            and forward_batch.req_pool_indices is req_pool_indices
            and backend.req_to_token is req_to_token
            and not backend.use_mha
            and not in_capture
        ):
            backend.forward_metadata = metadata
            STATE.replays += 1
            return None
    return _admitted(original, backend, forward_batch, in_capture)


def _admitted(original: Callable[..., Any], backend: Any, forward_batch: Any, in_capture: bool) -> Any:
    """The same for a batch that is not known yet, or whose replay has more to do."""
    fill: BackendFills = getattr(backend, ATTRIBUTE)
    if in_capture or forward_batch.forward_mode is not fill.mode:
        return original(backend, forward_batch, in_capture=in_capture)
    captured = fill.captured.get(forward_batch.batch_size)
    if captured is None or not fill.admits(captured, forward_batch):
        return original(backend, forward_batch)
    # All that this call can do here; it takes longer than everything else in a replay.
    if backend.use_mha or backend.enable_auto_select_prefill_impl:
        backend.set_dsa_prefill_impl(forward_batch=None)
    backend.forward_metadata = captured.metadata
    STATE.replays += 1
    if fill.checked is not None:
        fill.checked.plan(forward_batch, original)
    return None


def _in_graph(original: Callable[..., Any], backend: Any, forward_batch: Any) -> Any:
    fill = getattr(backend, ATTRIBUTE, None)
    if fill is None or forward_batch.forward_mode is not fill.mode:
        return original(backend, forward_batch)
    capturing = is_capturing()
    try:
        fill.record(forward_batch)
    except START_ERRORS as error:
        if capturing:
            raise CaptureError(forward_batch.batch_size, error) from error
        _give_up(error)
        return original(backend, forward_batch)
    return None


def _execute(original: Callable[..., Any], runner: Any, *batch: Any, **more: Any) -> Any:
    """Publishes the end of the read inside the replay, behind which the scheduler may overwrite.

    Up to 0.5.21 SGLang publishes an event recorded before the replay, where its own fill has been
    enqueued: too early for a fill in the graph. Later releases publish none for DSA, and the scheduler
    waits for the whole forward. Behind the fill, the draft model reads only the tables that it filled,
    as in target-verify, where SGLang itself publishes an event from inside the graph.
    """
    output = original(runner, *batch, **more)
    fill = getattr(runner.draft_extend_attn_backend, ATTRIBUTE, None)
    read_done = None if fill is None else fill.read_done(runner.bs)
    if read_done is not None:
        model_runner = runner.model_runner
        name = _fence_event(model_runner)
        assert name is not None  # asked for when the backend was taken over
        # SGLang's KV canary, a debugging aid, reads req_to_token in the graph behind the fill.
        has_canary = getattr(model_runner, "canary_manager", None) is not None
        setattr(model_runner, name, None if has_canary else read_done)
    return output


def _fence_event(model_runner: Any) -> str | None:
    return next((name for name in FENCE_EVENTS if hasattr(model_runner, name)), None)


# Each hook goes when SGLang's DSA backend records its own draft-extend fill in the graph.
HOOKS = (
    Hook(f"{_FACTORY}._create_dsa_prefill_backend", ("self",), _create_backend),
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
    Hook(f"{_BACKEND}.init_forward_metadata_in_graph", ("self", "forward_batch"), _in_graph),
    Hook(
        f"{_RUNNER}.execute",
        ("self", "forward_batch", "select_index"),
        _execute,
        also=(("self", "forward_batch"),),  # up to 0.5.19
    ),
)
NEEDS = (
    Call(f"{_BACKEND}.set_dsa_prefill_impl", ("self", "forward_batch")),
    Call(f"{_BACKEND}._refresh_paged_mqa_schedule_metadata", ("self", "metadata", "seqlens_32_2d")),
    Call(f"{_BACKEND}._build_topk_v2_plan", ("self", "seqlens_expanded")),
    Call(f"{_BACKEND}._compute_flashmla_metadata", ("self", "cache_seqlens", "seq_len_q")),
    Fields(
        _METADATA,
        (
            "page_size",
            "cache_seqlens_int32",
            "cu_seqlens_k",
            "dsa_seqlens_expanded",
            "dsa_cache_seqlens_int32",
            "dsa_cu_seqlens_k",
            "page_table_1",
            "real_page_table",
            "paged_mqa_schedule_metadata",
            "paged_mqa_ctx_lens_2d",
            "topk_v2_plan",
            "flashmla_metadata",
        ),
    ),
    Call(f"{_FORWARD_BATCH}.ForwardMode.is_draft_extend_v2", ("self",)),
    Fields(
        f"{_FORWARD_BATCH}.ForwardBatch",
        ("forward_mode", "batch_size", "seq_lens", "req_pool_indices"),
    ),
    Sets(f"{_FACTORY}.__init__", ("draft_model_runner",)),
    Sets(f"{_BACKEND}.init_cuda_graph_state", ("decode_cuda_graph_metadata",)),
    Sets(f"{_RUNNER}.__init__", ("draft_extend_attn_backend", "model_runner")),
    Sets(f"{_RUNNER}.execute", ("bs",)),
)

_asked_for: str | None = None
_check_every = 0
_taken_over: weakref.WeakSet[Any] = weakref.WeakSet()


def is_generation() -> bool:
    """Whether this SGLang captures DSA's draft-extend in CUDA graphs, 0.5.15 and later.

    The top-k plan came with the graphs. Where it is missing for another reason, the eager adapter
    does not fit either, and says what is missing.
    """
    return not hooks.misfits([Fields(_METADATA, ("topk_v2_plan",))])


def arm(backend: str, check_every: int) -> None:
    """From now on draft-extend backends are taken over, with this implementation or "auto"."""
    global _asked_for, _check_every
    _asked_for, _check_every = backend, check_every
