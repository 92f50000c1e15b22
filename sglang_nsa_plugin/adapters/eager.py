"""SGLang 0.5.11 to 0.5.14: one launch from Python fills the metadata of a draft-extend step.

These releases run NSA/DSA draft-extend without a CUDA graph: ``init_forward_metadata`` plans each step
with some twenty small operations. 0.5.11 and 0.5.12 without the overlap scheduler replay a graph, after
``init_forward_metadata_replay_cuda_graph``. Draft-decode and verify of 0.5.13 and 0.5.14 run in graphs:
they are filled there, as in later releases (:mod:`in_graph`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import hooks, in_graph, taken_over
from sglang_nsa_plugin.adapters.adapter import SET_UP_ERRORS, Adapter, Parts, Request, Takeover
from sglang_nsa_plugin.adapters.eager_fill import EagerFill
from sglang_nsa_plugin.adapters.eager_names import DSA, NSA, SglangNames, names_of_generation
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook, Requirement
from sglang_nsa_plugin.adapters.ragged_fill import RaggedFill
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.state import DRAFT_EXTEND

NAME = "eager"
ATTRIBUTE = "_nsa_draft_extend_fill"  # on a backend that the plugin took over: its EagerFill
RAGGED_ATTRIBUTE = "_nsa_ragged_fill"  # on the same backend: its RaggedFill

_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info"
_SPEC_INFO = "sglang.srt.speculative.eagle_info"
# The field with the rows per request of a ragged replay: in 0.5.12, then in 0.5.11.
_ACCEPTED = (
    Fields(f"{_SPEC_INFO}.EagleDraftExtendInput", ("num_accept_tokens",)),
    Fields(f"{_SPEC_INFO}.EagleDraftInput", ("num_accepted_tokens",)),
)
_REPLAY_PARAMETERS = (
    "self",
    "bs",
    "req_pool_indices",
    "seq_lens",
    "seq_lens_sum",
    "encoder_lens",
    "forward_mode",
    "spec_info",
    "seq_lens_cpu",
    "out_cache_loc",
)


def adapter_for_installed() -> Adapter:
    """The adapter with the tables of the installed SGLang."""
    names = names_of_generation()
    if names is DSA:
        common, in_graphs = Parts(_hooks(DSA), _needs(DSA)), in_graph.BEFORE_0_5_15
        takeovers = {**_takeovers, **{role: taken_over.TAKEOVERS[role] for role in in_graphs}}
        untried = {
            role: f"before SGLang 0.5.15, only servers of 0.5.14 have filled {role} on a GPU"
            for role in in_graphs
        }
        return Adapter(NAME, common, takeovers, _why_unfilled, in_graphs, untried)
    replay = Hook(
        f"{NSA.backend}.init_forward_metadata_replay_cuda_graph",
        (*_REPLAY_PARAMETERS, "actual_forward_mode"),
        _replay,
        also=(_REPLAY_PARAMETERS,),  # 0.5.11
    )
    is_ragged = Call(f"{_FORWARD_BATCH}.ForwardMode.is_draft_extend", ("self",))
    common = Parts((*_hooks(NSA), replay), (*_needs(NSA), _accepted_tokens(), is_ragged))
    return Adapter(NAME, common, _takeovers, _why_unfilled)


def _accepted_tokens() -> Fields:
    """The table row of this release; the first one where none fits."""
    return next((row for row in _ACCEPTED if not hooks.misfits([row])), _ACCEPTED[0])


def _init(
    original: Callable[..., None], backend: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """Every backend of the draft worker may plan draft-extend, except those of single draft steps."""
    original(backend, model_runner, *args, **kwargs)
    in_graph.consider_target(backend, model_runner)
    request = _takeover.request
    if request is None or not model_runner.is_draft_worker or backend.speculative_num_steps:
        return
    names = names_of_generation()
    why_not = why_unsupported(backend, model_runner, names)
    if why_not is None:
        _take_over(backend, request, names)
    else:
        _takeover.outcome.step_aside(request.asked_for, why_not)


def _take_over(backend: Any, request: Request, names: SglangNames) -> None:
    every, outcome = request.check_every, _takeover.outcome
    fills: dict[str, EagerFill | RaggedFill] = {}
    try:
        choice = dispatch.choose(request.backend, backend.req_to_token.device)
        fills[ATTRIBUTE] = EagerFill(backend, choice, names, every, outcome)
        if names is NSA:
            (accepted,) = _accepted_tokens().names
            fills[RAGGED_ATTRIBUTE] = RaggedFill(backend, choice, names, accepted, every, outcome)
    except SET_UP_ERRORS as error:
        _takeover.fail(error)
        return
    vars(backend).update(fills)
    _takeover.add(backend)
    outcome.report_active(NAME, choice)


def hand_back(backend: Any) -> None:
    """SGLang plans this backend's steps from now on."""
    _takeover.discard(backend)
    for name in (ATTRIBUTE, RAGGED_ATTRIBUTE):
        vars(backend).pop(name, None)


_takeover = Takeover(hand_back)
_takeovers = {DRAFT_EXTEND: _takeover}


def _why_unfilled(backend: Any) -> str | None:
    """Each draft-extend step is filled by a launch of its own: there is no graph to wait for."""
    return taken_over.why_unfilled(backend) if hasattr(backend, taken_over.ATTRIBUTE) else None


def why_unsupported(backend: Any, model_runner: Any, names: SglangNames) -> str | None:
    """Why this configuration stays with SGLang, or None when the adapter covers it."""
    from sglang.srt.environ import envs

    missing = [name for name in _backend_attributes(names) if not hasattr(backend, name)]
    if missing:
        return f"{type(backend).__name__} has no attribute {', '.join(missing)}"
    metadata = getattr(importlib.import_module(names.module), names.metadata)
    known = {*names.fields, names.outputs["ctx_lens"]}
    unknown = {field.name for field in dataclasses.fields(metadata)} - known
    if unknown:
        return f"{names.metadata} has unknown fields: {', '.join(sorted(unknown))}"
    if torch.version.hip is not None:
        return "HIP is not supported"
    server_args = model_runner.server_args
    if getattr(server_args, "enable_multi_layer_eagle", False):
        return "the multi-layer EAGLE runner is not supported"
    if getattr(server_args, "enable_hisparse", False):
        return "HiSparse is not supported"
    if envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get():
        # A step planned on another stream would write over tensors that a running forward reads.
        return "planning on a separate stream (SGLANG_ENABLE_OVERLAP_PLAN_STREAM) is not supported"
    return None


def _backend_attributes(names: SglangNames) -> tuple[str, ...]:
    """Set by the backend's constructor, so no class can be asked for them."""
    return (
        "req_to_token",
        "real_page_size",
        "speculative_num_draft_tokens",
        "use_mha",
        "enable_auto_select_prefill_impl",
        names.index_topk,
        names.decode_impl,
    )


def _init_forward_metadata(
    original: Callable[..., Any], backend: Any, forward_batch: Any, *more: Any, **named: Any
) -> Any:
    fill = getattr(backend, ATTRIBUTE, None)  # first: all other backends' steps come here, too
    sglang_plan = functools.partial(original, backend, forward_batch, *more, **named)
    if fill is None or not forward_batch.forward_mode.is_draft_extend_v2():
        return sglang_plan()
    filled = attempt(fill.step, _takeover.abandon, forward_batch, sglang_plan)
    return None if filled else sglang_plan()


def _replay(
    original: Callable[..., Any],
    backend: Any,
    bs: int,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_sum: int,
    encoder_lens: torch.Tensor | None,
    forward_mode: Any,
    spec_info: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    fill = getattr(backend, RAGGED_ATTRIBUTE, None)
    if (
        fill is not None
        and forward_mode.is_draft_extend()
        and attempt(fill.replay, _takeover.abandon, bs, seq_lens, req_pool_indices, spec_info)
    ):
        return None
    return original(
        backend,
        bs,
        req_pool_indices,
        seq_lens,
        seq_lens_sum,
        encoder_lens,
        forward_mode,
        spec_info,
        *args,
        **kwargs,
    )


# Each hook goes when SGLang itself plans a draft-extend step of these releases with one launch.
def _hooks(names: SglangNames) -> tuple[Hook, ...]:
    return (
        Hook(
            f"{names.backend}.__init__",
            (
                "self",
                "model_runner",
                "skip_prefill",
                "speculative_step_id",
                "topk",
                "speculative_num_steps",
            ),
            _init,
        ),
        Hook(
            f"{names.backend}.init_forward_metadata",
            ("self", "forward_batch"),
            _init_forward_metadata,
        ),
    )


def _needs(names: SglangNames) -> tuple[Requirement, ...]:
    return (
        Call(f"{names.backend}.{names.set_prefill_impl}", ("self", "forward_batch")),
        Call(f"{names.backend}._compute_flashmla_metadata", ("self", "cache_seqlens", "seq_len_q")),
        Call(f"{names.backend}.get_device_int32_arange", ("self", "length"), also=(("self", "l"),)),
        Call(f"{names.package}.utils.cal_padded_tokens", ("forward_batch",)),
        Call(f"{_FORWARD_BATCH}.ForwardMode.is_draft_extend_v2", ("self",)),
        Fields(f"{names.module}.{names.metadata}", names.fields),
        Fields(
            f"{_FORWARD_BATCH}.ForwardBatch",
            (
                "forward_mode",
                "batch_size",
                "seq_lens",
                "seq_lens_cpu",
                "seq_lens_sum",
                "req_pool_indices",
                "extend_num_tokens",
                "extend_seq_lens",
                "extend_seq_lens_cpu",
                "global_num_tokens_cpu",
            ),
        ),
    )
