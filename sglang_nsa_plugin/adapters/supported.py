"""Which configurations of SGLang the in-graph adapter covers, role by role."""

from __future__ import annotations

from typing import Any

import torch

from sglang_nsa_plugin.adapters import hooks, kpool
from sglang_nsa_plugin.adapters.hooks import Call
from sglang_nsa_plugin.adapters.roles import (
    DECODE_ROLE,
    DRAFT_DECODE_ROLE,
    DRAFT_EXTEND_ROLE,
    VERIFY_ROLE,
    Role,
)
from sglang_nsa_plugin.adapters.server_config import resolved

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
# Their draft-decode, target-verify and draft-extend run in this order on one stream. Up to 0.5.17 others
# free req_to_token by an event recorded before the replay: too early for a fill in the graph.
ALGORITHMS = ("EAGLE", "EAGLE3", "NEXTN")

ONE_STEP = "with one speculative step SGLang has no draft-decode graph"
# Where a backend's reads of req_to_token end: of decode IN_REPLAY, as DSA has no answer of its own. At
# capture SGLang's decode_cuda_graph_runner.py calls init_forward_metadata_in_graph, where the fill is
# recorded, and right after it records the event that frees req_to_token, which the scheduler waits for
# (0.5.18 l. 1155-1156, 0.5.19 l. 1190-1191, 0.5.20 l. 1148-1149, 0.5.21 l. 1180-1181, 0.5.22 l.
# 1273-1274, 0.5.23 l. 638-639). 0.5.14 to 0.5.17 record it before the replay (0.5.17 l. 1230-1231).
# Without external events 0.5.18 to 0.5.21 would do so, too; each torch that they take has them for CUDA.
READ_ENDS = Call(
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.shared_read_ends", ("self", "fm")
)
NO_DECODE_FENCE = (
    "decode is filled from SGLang 0.5.18 on. With earlier releases the scheduler may overwrite "
    "req_to_token before a fill in the graph has read it"
)

_DECLINED_ARGUMENTS = {
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_pdmux": "PD multiplexing",
    "enable_hisparse": "HiSparse",
}
_DECLINED_VARIABLES = {
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM": "it plans verify on another stream",
    # Where the fill is switched off on the device, only the hook has SGLang fill.
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "later replays do not pass the plugin's hook",
}


def fence_event(model_runner: Any) -> str | None:
    """The attribute of a model runner under which the scheduler finds the event of its last reader."""
    return next((name for name in FENCE_EVENTS if hasattr(model_runner, name)), None)


def why_draft_extend_unsupported(backend: Any, model_runner: Any) -> str | None:
    """Why draft-extend of this configuration stays with SGLang, or None when the adapter covers it."""
    if fence_event(model_runner) is None:
        return f"the model runner has none of {', '.join(FENCE_EVENTS)}, which the scheduler waits on"
    return _why_role_unsupported(backend, model_runner, DRAFT_EXTEND_ROLE)


def why_verify_unsupported(backend: Any, model_runner: Any) -> str | None:
    """Why verify of this configuration stays with SGLang, or None when the adapter covers it.

    No event is published for verify: the scheduler waits for the last reader of ``req_to_token`` in a
    step, and that is draft-extend, later on the same stream. So these are the algorithms that have it.
    """
    return _why_not_before_draft_extend(backend, model_runner, VERIFY_ROLE)


def why_draft_decode_unsupported(multi_step: Any, model_runner: Any) -> str | None:
    """The same of draft-decode, whose backend has one of SGLang's DSA backends for each draft step."""
    if not multi_step.attn_backends:
        return ONE_STEP
    if multi_step.topk != 1:
        return f"draft trees (--speculative-eagle-topk {multi_step.topk}) are not supported, only chains"
    return _why_not_before_draft_extend(multi_step.attn_backends[0], model_runner, DRAFT_DECODE_ROLE)


def _why_not_before_draft_extend(backend: Any, model_runner: Any, role: Role) -> str | None:
    algorithm = speculative_algorithm(model_runner.server_args)
    if algorithm not in ALGORITHMS:
        return f"{role.name} is filled with {', '.join(ALGORITHMS)} alone, not with {algorithm}"
    return _why_target_unsupported(backend, model_runner, role)


def why_no_decode_fence() -> str | None:
    """Why no event says when a fill in a decode graph has read ``req_to_token``, or None."""
    return NO_DECODE_FENCE if hooks.misfits([READ_ENDS]) else None


def why_decode_unsupported(backend: Any, model_runner: Any) -> str | None:
    """Why plain decode of this configuration stays with SGLang, or None when the adapter covers it.

    No event is published for it: SGLang publishes the one that it has recorded behind the fill.
    """
    why_no_fence = why_no_decode_fence()
    if why_no_fence is not None:
        return why_no_fence
    ends = backend.shared_read_ends(*DECODE_ROLE.modes())
    if ends.name == "PRE_REPLAY":
        return f"{type(backend).__name__} frees req_to_token before the replay ({ends.name})"
    return _why_target_unsupported(backend, model_runner, DECODE_ROLE)


def speculative_algorithm(server_args: Any) -> str | None:
    """The name of the server's speculative algorithm; None without speculative decoding."""
    name: str | None = getattr(resolved(server_args), "speculative_algorithm", None)
    return name


def _why_target_unsupported(backend: Any, model_runner: Any, role: Role) -> str | None:
    """What keeps verify, draft-decode and decode with SGLang alike."""
    server_args = resolved(model_runner.server_args)
    for variable, why in _DECLINED_VARIABLES.items():
        if _is_set(variable):
            return f"{variable} is not supported: {why}"
    if getattr(server_args, "dcp_size", 1) > 1:
        return f"decode context parallelism (dcp_size {server_args.dcp_size}) is not supported"
    for argument, what in _DECLINED_ARGUMENTS.items():
        if getattr(server_args, argument, False):
            return f"{what} ({argument}) is not supported"
    return _why_role_unsupported(backend, model_runner, role)


def _is_set(variable: str) -> bool:
    """Whether SGLang's environment has this switch on; a release may lack it."""
    from sglang.srt.environ import envs

    switch = getattr(envs, variable, None)
    return switch is not None and bool(switch.get())


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
    if kpool.is_pooled(backend):
        why_not = kpool.why_unsupported(backend, server_args, role)
        if why_not is not None:
            return why_not
    graphs = getattr(server_args, "cuda_graph_config", None)
    if graphs is not None and graphs.decode.backend not in ("full", "disabled"):
        return f"{graphs.decode.backend} CUDA graphs are not supported, only full ones"
    return None
