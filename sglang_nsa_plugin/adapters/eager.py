"""SGLang 0.5.11 to 0.5.14: one launch from Python fills the metadata of a draft-extend step.

There NSA/DSA draft-extend runs without a CUDA graph: ``init_forward_metadata`` plans each step with some
twenty small operations. In 0.5.11 and 0.5.12, without the overlap scheduler, it runs in a graph behind
``init_forward_metadata_replay_cuda_graph``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.eager_fill import EagerFill
from sglang_nsa_plugin.adapters.eager_names import CTX_LENS, DSA, NSA, Names, names_of_generation
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook
from sglang_nsa_plugin.adapters.outcome import START_ERRORS, decline, decline_after, take_over
from sglang_nsa_plugin.adapters.ragged_fill import RaggedFill
from sglang_nsa_plugin.state import STATE

NAME = "eager"
ATTRIBUTE = "_nsa_draft_extend_fill"  # on a backend whose draft-extend fill is ours
RAGGED_ATTRIBUTE = "_nsa_ragged_fill"

_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info"
_SPEC_INFO = "sglang.srt.speculative.eagle_info"
# Where the number of tokens is that a request of a ragged replay extends by: 0.5.12, then 0.5.11.
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


class Adapter(NamedTuple):
    """The tables of one release."""

    NAME: str
    HOOKS: tuple[Hook, ...]
    NEEDS: tuple[Call | Fields, ...]
    arm: Callable[[str, int], None]


def of_generation() -> Adapter:
    """The adapter with the tables of the installed SGLang."""
    if names_of_generation() is DSA:
        return Adapter(NAME, _hooks(DSA), _needs(DSA), functools.partial(arm, DSA, None))
    accepted = next((row for row in _ACCEPTED if not hooks.misfits([row])), _ACCEPTED[0])
    replay = Hook(
        f"{NSA.backend}.init_forward_metadata_replay_cuda_graph",
        (*_REPLAY_PARAMETERS, "actual_forward_mode"),
        _replay,
        also=(_REPLAY_PARAMETERS,),  # 0.5.11
    )
    is_ragged = Call(f"{_FORWARD_BATCH}.ForwardMode.is_draft_extend", ("self",))
    return Adapter(
        NAME,
        (*_hooks(NSA), replay),
        (*_needs(NSA), accepted, is_ragged),
        functools.partial(arm, NSA, accepted.names[0]),
    )


def _init(
    original: Callable[..., None], backend: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """Every backend of the draft worker that may plan draft-extend; those of single steps never do."""
    original(backend, model_runner, *args, **kwargs)
    if _armed is None or not model_runner.is_draft_worker or backend.speculative_num_steps:
        return
    refusal = uncovered(backend, model_runner, _armed.names)
    if refusal is None:
        _take_over(backend, _armed)
    elif STATE.reason != refusal:  # a draft worker makes several backends; they say it once
        decline(_armed.asked_for, refusal)


def _take_over(backend: Any, armed: Armed) -> None:
    fills: dict[str, EagerFill | RaggedFill] = {}
    try:
        choice = dispatch.choose(armed.asked_for, backend.req_to_token.device)
        fills[ATTRIBUTE] = EagerFill(backend, choice, armed.names, armed.check_every)
        if armed.accepted is not None:
            fills[RAGGED_ATTRIBUTE] = RaggedFill(
                backend, choice, armed.names, armed.accepted, armed.check_every
            )
    except START_ERRORS as error:
        _give_up(armed.asked_for, error)
        return
    vars(backend).update(fills)
    _taken_over.add(backend)
    take_over(choice)


def _give_up(asked_for: str, error: Exception) -> None:
    """Hands every backend back to SGLang, or ends the start where the fill was asked for by name."""
    global _armed
    decline_after(asked_for, error)
    _armed = None
    for backend in list(_taken_over):
        for name in (ATTRIBUTE, RAGGED_ATTRIBUTE):
            vars(backend).pop(name, None)
    _taken_over.clear()


def uncovered(backend: Any, model_runner: Any, names: Names) -> str | None:
    """Why this configuration stays with SGLang, or None when the adapter covers it."""
    from sglang.srt.environ import envs

    missing = [name for name in _backend_attributes(names) if not hasattr(backend, name)]
    if missing:
        return f"{type(backend).__name__} has no attribute {', '.join(missing)}"
    metadata = getattr(importlib.import_module(names.module), names.metadata)
    unknown = {field.name for field in dataclasses.fields(metadata)} - {*names.fields, CTX_LENS}
    if unknown:
        return f"{names.metadata} has further fields: {', '.join(sorted(unknown))}"
    if torch.version.hip is not None:
        return "HIP is not covered"
    server_args = model_runner.server_args
    if getattr(server_args, "enable_multi_layer_eagle", False):
        return "the multi-layer EAGLE runner is not covered"
    if getattr(server_args, "enable_hisparse", False):
        return "HiSparse is not covered"
    if envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get():
        # A step planned on another stream would write over tensors that a running forward reads.
        return "planning on a stream of its own is not covered"
    return None


def _backend_attributes(names: Names) -> tuple[str, ...]:
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


def _init_forward_metadata(original: Callable[..., Any], backend: Any, forward_batch: Any) -> Any:
    fill = getattr(backend, ATTRIBUTE, None)  # first: every step of every other backend comes by
    if fill is None or not forward_batch.forward_mode.is_draft_extend_v2():
        return original(backend, forward_batch)
    sglang_plan = functools.partial(original, backend, forward_batch)
    return None if fill.step(forward_batch, sglang_plan) else sglang_plan()


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
        and fill.replay(bs, seq_lens, req_pool_indices, spec_info)
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


# Each hook goes when SGLang plans a draft-extend step of these releases with one launch itself.
def _hooks(names: Names) -> tuple[Hook, ...]:
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


def _needs(names: Names) -> tuple[Call | Fields, ...]:
    return (
        Call(f"{names.backend}.{names.set_prefill_impl}", ("self", "forward_batch")),
        Call(f"{names.backend}._compute_flashmla_metadata", ("self", "cache_seqlens", "seq_len_q")),
        Call(f"{names.backend}.get_device_int32_arange", ("self",)),
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


@dataclasses.dataclass(frozen=True)
class Armed:
    """With what draft-extend backends are taken over.

    Attributes:
        asked_for: the implementation, or "auto".
        check_every: eager steps from one shadow check to the next, 0 for none. Ragged replays have none:
            SGLang leaves rows of theirs unfilled, and asks the device for how many there are.
        names: SGLang's.
        accepted: the field with the accepted tokens, None where nothing is replayed ragged.
    """

    asked_for: str
    check_every: int
    names: Names
    accepted: str | None


_armed: Armed | None = None
_taken_over: weakref.WeakSet[Any] = weakref.WeakSet()


def arm(names: Names, accepted: str | None, backend: str, check_every: int) -> None:
    """From now on draft-extend backends are taken over."""
    global _armed
    _armed = Armed(backend, check_every, names, accepted)
