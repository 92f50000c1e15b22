"""SGLang 0.5.15 to 0.5.23: fills are recorded inside the captured graphs of draft-extend and verify.

At capture a runner calls ``init_forward_metadata_in_graph`` on its backend, which DSA leaves empty.
The fill, and the tables that SGLang derives from it, are recorded there. At replay
``forward_metadata`` is pointed at the captured tensors; the host launches nothing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import fields, hooks
from sglang_nsa_plugin.adapters.adapter import SET_UP_ERRORS, Adapter, Request, Takeover
from sglang_nsa_plugin.adapters.captured_fill import BackendFills, CaptureError, is_capturing
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook, Sets
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.adapters.roles import DRAFT_EXTEND_ROLE, VERIFY_ROLE, Role
from sglang_nsa_plugin.adapters.server_config import resolved
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.state import DRAFT_EXTEND, STATE, VERIFY, VERIFY_STATE

NAME = "in-graph"
ATTRIBUTE = "_nsa_fills"  # on a backend that the plugin took over: its BackendFills
# On the same backend: `fast_path` of its BackendFills, of draft-extend and of verify.
FAST_PATH, VERIFY_FAST_PATH = "_nsa_draft_extend_fast_path", "_nsa_verify_fast_path"
RETIRED = "_nsa_retired_fill"  # on a backend that was handed back: its former BackendFills
# The name of the event that frees req_to_token for the scheduler: since 0.5.18, and before.
FENCE_EVENTS = ("shared_read_done_event", "war_fastpath_read_done_event")
# Set by the backend's constructor, so no class can be asked for them.
BACKEND_ATTRIBUTES = (
    "req_to_token",
    "dsa_index_topk",
    "speculative_num_draft_tokens",
    "use_mha",
    "enable_auto_select_prefill_impl",
)
# Their target-verify runs between draft-decode and draft-extend on one stream. Up to 0.5.17 others free
# req_to_token by an event recorded before the replay: too early for a fill in the graph.
VERIFY_ALGORITHMS = ("EAGLE", "EAGLE3", "NEXTN")

_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_BACKEND = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
_METADATA = "sglang.srt.layers.attention.dsa_backend.DSAMetadata"
_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info"
_RUNNER = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner"


def _create_backend(original: Callable[..., Any], factory: Any) -> Any:
    """The factory's product is the one backend that draft-extend graphs are captured with."""
    product = original(factory)
    backend = product[1] if isinstance(product, tuple) else product
    _consider(backend, factory.draft_model_runner, DRAFT_EXTEND_ROLE, why_unsupported)
    return product


def _init_backend(
    original: Callable[..., None], backend: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """The target's backend makes the metadata of verify; the draft model's have other plans."""
    original(backend, model_runner, *args, **kwargs)
    if not getattr(model_runner, "is_draft_worker", True) and not backend.speculative_num_steps:
        _consider(backend, model_runner, VERIFY_ROLE, why_verify_unsupported)


def _consider(
    backend: Any, model_runner: Any, role: Role, why_unsupported: Callable[[Any, Any], str | None]
) -> None:
    """Takes a backend over where that was asked for and is supported."""
    takeover = _takeovers[role.name]
    request = takeover.request
    if request is None:
        return
    why_not = why_unsupported(backend, model_runner)
    if why_not is None:
        _take_over(backend, request, role, takeover)
    else:
        takeover.outcome.step_aside(request.backend, why_not)


def _take_over(backend: Any, request: Request, role: Role, takeover: Takeover) -> None:
    try:
        choice = dispatch.choose(request.backend, backend.req_to_token.device)
        fills = BackendFills(backend, role, choice, request.check_every, takeover.outcome)
    except SET_UP_ERRORS as error:
        takeover.fail(error)
        return
    setattr(backend, ATTRIBUTE, fills)
    setattr(backend, VERIFY_FAST_PATH if role.is_handed_slices else FAST_PATH, fills.fast_path)
    takeover.add(backend)
    takeover.outcome.report_active(NAME, choice, fills.remainder_last is not None)


def hand_back(backend: Any) -> None:
    """SGLang fills this backend from now on, whatever graphs of it were captured."""
    for takeover in _takeovers.values():
        takeover.discard(backend)
    for fast_path in (FAST_PATH, VERIFY_FAST_PATH):
        vars(backend).pop(fast_path, None)
    fills = vars(backend).pop(ATTRIBUTE, None)
    if fills is not None:
        fills.retire()
        setattr(backend, RETIRED, fills)  # graphs hold its addresses


def _revalidate(backend: Any) -> None:
    getattr(backend, ATTRIBUTE).fast_path.clear()


# An error while one role is set up, or in its service, hands back the backends of that role alone.
_takeovers = {role: Takeover(hand_back, _revalidate, OUTCOMES[role]) for role in (VERIFY, DRAFT_EXTEND)}


def _why_unfilled(backend: Any) -> str | None:
    fills = getattr(backend, ATTRIBUTE)
    if fills.captured:
        return None
    return f"SGLang captured no CUDA graph of {fills.role.name}, and this adapter fills nothing else"


def why_unsupported(backend: Any, model_runner: Any) -> str | None:
    """Why draft-extend of this configuration stays with SGLang, or None when the adapter covers it."""
    if _fence_event(model_runner) is None:
        return f"the model runner has none of {', '.join(FENCE_EVENTS)}, which the scheduler waits on"
    return _why_role_unsupported(backend, model_runner, DRAFT_EXTEND_ROLE)


def why_verify_unsupported(backend: Any, model_runner: Any) -> str | None:
    """Why verify of this configuration stays with SGLang, or None when the adapter covers it.

    No event is published for verify: the scheduler waits for the last reader of ``req_to_token`` in a
    step, and that is draft-extend, later on the same stream. So these are the algorithms that have it.
    """
    server_args = resolved(model_runner.server_args)
    algorithm = getattr(server_args, "speculative_algorithm", None)
    if algorithm not in VERIFY_ALGORITHMS:
        return f"verify is filled with {', '.join(VERIFY_ALGORITHMS)} alone, not with {algorithm}"
    for variable, why in _VARIABLES_DECLINED_BY_VERIFY.items():
        if _is_set(variable):
            return f"{variable} is not supported: {why}"
    if getattr(server_args, "dcp_size", 1) > 1:
        return f"decode context parallelism (dcp_size {server_args.dcp_size}) is not supported"
    for argument, what in _DECLINED_BY_VERIFY.items():
        if getattr(server_args, argument, False):
            return f"{what} ({argument}) is not supported"
    if _fills_in_graph(type(backend)):
        return f"{type(backend).__name__} fills in the graph itself"
    return _why_role_unsupported(backend, model_runner, VERIFY_ROLE)


_DECLINED_BY_VERIFY = {
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_pdmux": "PD multiplexing",
    "enable_hisparse": "HiSparse",
}


_VARIABLES_DECLINED_BY_VERIFY = {
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM": "it plans verify on another stream",
    # Where the fill is switched off on the device, only the hook has SGLang fill.
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "later replays do not pass the plugin's hook",
}


def _is_set(variable: str) -> bool:
    """Whether SGLang's environment has this switch on; a release may lack it."""
    from sglang.srt.environ import envs

    switch = getattr(envs, variable, None)
    return switch is not None and bool(switch.get())


def _fills_in_graph(backend_class: type) -> bool:
    """Whether SGLang does something in the method in whose place the plugin fills."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    method = backend_class.init_forward_metadata_in_graph  # type: ignore[attr-defined]
    return inspect.unwrap(method) is not inspect.unwrap(AttentionBackend.init_forward_metadata_in_graph)


def _why_role_unsupported(backend: Any, model_runner: Any, role: Role) -> str | None:
    missing = [name for name in BACKEND_ATTRIBUTES if not hasattr(backend, name)]
    if missing:
        return f"{type(backend).__name__} has no attribute {', '.join(missing)}"
    modes = role.modes()
    if len(modes) != 1:
        names = ", ".join(mode.name for mode in modes) or "none"
        return f"one ForwardMode must be {role.name}, got {names}"
    server_args = resolved(model_runner.server_args)
    if torch.version.hip is not None:
        return "HIP is not supported"
    if getattr(server_args, "enable_multi_layer_eagle", False):
        return "the multi-layer EAGLE runner is not supported"
    if getattr(backend, "dsa_index_kpool", 1) > 1:
        return f"index k-pooling ({backend.dsa_index_kpool}) is not supported"
    graphs = getattr(server_args, "cuda_graph_config", None)
    if graphs is not None and graphs.decode.backend not in ("full", "disabled"):
        return f"{graphs.decode.backend} CUDA graphs are not supported, only full ones"
    return None


def _init_cuda_graph_state(
    original: Callable[..., Any], backend: Any, max_bs: int, max_num_tokens: int
) -> Any:
    fills = getattr(backend, ATTRIBUTE, None)
    if fills is not None:
        fills.forget()
    if fills is None or fills.role is not DRAFT_EXTEND_ROLE:
        return original(backend, max_bs, max_num_tokens)
    with _as_without_speculation(backend):
        return original(backend, max_bs, max_num_tokens)


@contextlib.contextmanager
def _as_without_speculation(backend: Any) -> Iterator[None]:
    """SGLang leaves ``page_table_1`` out where nothing reads it, but never with speculation.

    It keeps the table for graphs of target-verify and draft-decode. Draft-extend graphs read it no more
    than decode graphs do. All other conditions, such as the choice of the top-k kernel, stay SGLang's.
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
    """Before a replay: points the backend at the captured tensors, or lets SGLang fill.

    The fast path is inline and compares objects by identity. Between two replays other work evicts the
    CPU's caches, so each function called from here would cost some 0.2 µs, and each object touched some
    0.1 µs. Memory that moved under the same tensor object is not looked for: comparing three addresses
    would cost 2 µs, no release of SGLang moves memory, and the shadow check validates every replay.
    """
    fast_path = getattr(backend, FAST_PATH, None)  # first: all other backends' steps come here, too
    if fast_path is None:
        return _verify_out_graph(original, backend, forward_batch, in_capture)
    hit = fast_path.get(forward_batch.batch_size)
    if hit is not None:
        mode, seq_lens, req_pool_indices, req_to_token, metadata = hit
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
    return _slow_path(original, backend, forward_batch, in_capture)


def _verify_out_graph(
    original: Callable[..., Any], backend: Any, forward_batch: Any, in_capture: bool
) -> Any:
    """The same for verify, whose runner cuts new slices from its buffers for each replay.

    Slices are compared by address, the other objects by identity.
    """
    fast_path = getattr(backend, VERIFY_FAST_PATH, None)
    if fast_path is None:
        return original(backend, forward_batch, in_capture=in_capture)
    hit = fast_path.get(forward_batch.batch_size)
    if hit is not None:
        mode, seq_lens, req_pool_indices, req_to_token, metadata = hit
        if (
            forward_batch.forward_mode is mode
            and forward_batch.seq_lens.data_ptr() == seq_lens
            and forward_batch.req_pool_indices.data_ptr() == req_pool_indices
            and backend.req_to_token is req_to_token
            and not backend.use_mha
            and not in_capture
        ):
            backend.forward_metadata = metadata
            VERIFY_STATE.replays += 1
            return None
    return _slow_path(original, backend, forward_batch, in_capture)


def _slow_path(original: Callable[..., Any], backend: Any, forward_batch: Any, in_capture: bool) -> Any:
    """SGLang fills what the plugin does not serve, and after an error of the plugin every step."""
    fills: BackendFills = getattr(backend, ATTRIBUTE)
    if in_capture:
        fills.drop_last_check()
        return original(backend, forward_batch, in_capture=True)
    abandon = _takeovers[fills.role.name].abandon
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
    fills.role.state.replays += 1
    if shadowed is not None:
        plan = shadowed.plan if fills.role.ends_step else shadowed.fill_ahead
        attempt(plan, shadowed.check.stop, forward_batch, original)
    return True


def _in_graph(original: Callable[..., Any], backend: Any, forward_batch: Any) -> Any:
    fills = getattr(backend, ATTRIBUTE, None)
    if fills is None or forward_batch.forward_mode is not fills.mode:
        return original(backend, forward_batch)
    capturing = is_capturing()
    try:
        fills.record(forward_batch)
    except SET_UP_ERRORS as error:
        if capturing:
            raise CaptureError(fills.role.name, forward_batch.batch_size, error) from error
        _takeovers[fills.role.name].fail(error)
        return original(backend, forward_batch)
    return None


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
        _takeovers[DRAFT_EXTEND].abandon(error)
    return output


def _itself(error: Exception) -> Exception | None:
    return error


def _publish_read_done(runner: Any) -> None:
    fills = getattr(runner.draft_extend_attn_backend, ATTRIBUTE, None)
    read_done = None if fills is None else fills.read_done(runner.bs)
    if read_done is not None:
        model_runner = runner.model_runner
        # SGLang's KV canary, a debugging aid, reads req_to_token in the graph after the fill.
        has_canary = getattr(model_runner, "canary_manager", None) is not None
        _set_fence(model_runner, None if has_canary else read_done)


def _set_fence(model_runner: Any, event: torch.cuda.Event | None) -> None:
    name = _fence_event(model_runner)
    assert name is not None  # required when the backend was taken over
    setattr(model_runner, name, event)


def _fence_event(model_runner: Any) -> str | None:
    return next((name for name in FENCE_EVENTS if hasattr(model_runner, name)), None)


# Each hook goes when SGLang's DSA backend records its own fills in the graphs.
_HOOKS = (
    Hook(f"{_FACTORY}._create_dsa_prefill_backend", ("self",), _create_backend),
    Hook(f"{_BACKEND}.__init__", ("self", "model_runner"), _init_backend, and_more=True),
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
    Sets(f"{_BACKEND}.init_cuda_graph_state", ("decode_cuda_graph_metadata",)),
    Sets(f"{_RUNNER}.__init__", ("draft_extend_attn_backend", "model_runner")),
    Sets(f"{_RUNNER}.execute", ("bs",)),
)

ADAPTER = Adapter(NAME, _HOOKS, _NEEDS, _takeovers, _why_unfilled)


def is_generation() -> bool:
    """Whether this SGLang captures DSA's draft-extend in CUDA graphs, as 0.5.15 and later do.

    The top-k plan came with the graphs. Where it is missing for another reason, the eager adapter does
    not fit either, and says what is missing.
    """
    return not hooks.misfits([Fields(_METADATA, (fields.TOPK_PLAN,))])
