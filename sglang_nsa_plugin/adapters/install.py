"""Chooses the adapter of the installed SGLang and puts its hooks in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.adapters import eager, hooks, in_graph, memory_release, releases, supported
from sglang_nsa_plugin.adapters.adapter import Adapter, Request
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.adapters.server_config import resolved
from sglang_nsa_plugin.adapters.tree_mask import TREE_MASK
from sglang_nsa_plugin.log import logger_of
from sglang_nsa_plugin.state import DECODE, DRAFT_EXTEND, VERIFY

logger = logger_of(__name__)

SPARSE_ATTENTION = ("dsa", "nsa")
NO_SPECULATION = "no speculative decoding, so there are no speculative steps to plan"
NO_PLAIN_DECODE = (
    "with speculative decoding the target model has verify in its graphs and no plain decode, which is "
    "filled on servers without speculation"
)
_BACKEND_ARGUMENTS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
)


def why_idle(server_args: Any, role: str = DRAFT_EXTEND) -> str | None:
    """Why a server with these arguments has no metadata of this role, or None when it has.

    The roles of a speculative step have the same answer.
    """
    arguments = resolved(server_args)
    is_speculative = supported.speculative_algorithm(server_args) is not None
    if is_speculative is (role == DECODE):
        return NO_PLAIN_DECODE if is_speculative else NO_SPECULATION
    backends = {str(getattr(arguments, name, None)) for name in _BACKEND_ARGUMENTS} - {"None"}
    if not backends.intersection(SPARSE_ATTENTION):
        return f"attention backend {', '.join(sorted(backends))} is not NSA/DSA sparse attention"
    if getattr(arguments, "disaggregation_mode", None) == "prefill":
        steps = DECODE if role == DECODE else DRAFT_EXTEND
        return f"a prefill server (--disaggregation-mode prefill) runs no {steps} steps"
    return None


def why_other_attention(server_args: Any) -> str | None:
    """Why draft-extend runs on other attention though the target model runs NSA/DSA, or None."""
    draft = getattr(resolved(server_args), "speculative_draft_attention_backend", None)
    if draft is None or draft in SPARSE_ATTENTION:
        return None
    return (
        f"draft-extend runs on --speculative-draft-attention-backend {draft}, which has no NSA/DSA "
        "metadata; leave that flag out to run it on the target's NSA/DSA attention"
    )


def adapter_for_installed() -> Adapter:
    """The one adapter that was written for code like that of the installed SGLang.

    A generation is recognised by what SGLang has. No other adapter is tried: one that was written for
    other code may seem to fit and fill tensors that nobody reads.
    """
    return in_graph.ADAPTER if in_graph.is_generation() else eager.adapter_for_installed()


def install(requests: Mapping[str, Request]) -> str | None:
    """Puts the adapter's hooks in place and arms the requested roles; returns why not if SGLang misfits.

    Raises:
        BackendUnavailableError: a backend was asked for by name, and the adapter cannot fill a role.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    adapter = adapter_for_installed()
    misfits = hooks.misfits(adapter.common.requirements)
    if misfits:
        return f"this SGLang does not fit the {adapter.name} adapter: {'; '.join(misfits)}"
    hooks.register(adapter.common.hooks)
    why_not_role = {
        role: why_role_misfits(adapter, role, request.is_named) for role, request in requests.items()
    }
    for role, why_not in why_not_role.items():
        if why_not is None:
            hooks.register(adapter.parts_of(role).hooks)
    HookRegistry.apply_hooks()
    why_none = hooks.why_not_applied(adapter.common.hooks)
    if why_none is not None:
        return why_none
    _warn_of_untested_release()
    for takeover in adapter.takeovers.values():
        takeover.arm(None)  # until its role is asked for
    for role, request in requests.items():
        why_not = why_not_role[role] or hooks.why_not_applied(adapter.parts_of(role).hooks)
        if why_not is None:
            adapter.takeovers[role].arm(request)
            adapter.takeovers[role].outcome.report_waiting(adapter.name)
            _warn_of_untried(adapter, role)
        else:
            OUTCOMES[role].step_aside(request.asked_for, why_not)
    verify = adapter.takeovers.get(VERIFY)
    if verify is not None and verify.request is not None:
        TREE_MASK.install(verify)
    memory_release.install(requests.values())
    return None


def why_role_misfits(adapter: Adapter, role: str, is_named: bool = False) -> str | None:
    """Why the adapter does not fill this role with the installed SGLang, or None."""
    why_no_fence = supported.why_no_decode_fence() if role == DECODE else None
    if why_no_fence is not None:
        return why_no_fence
    if role not in adapter.takeovers:
        return f"with this SGLang release the plugin fills no {role} metadata"
    if role in adapter.untried and not is_named:
        return f"{adapter.untried[role]}. To fill it all the same, {options.how_to_name(role)}"
    misfits = hooks.misfits(adapter.parts_of(role).requirements)
    return f"this SGLang does not fit the fill of {role}: {'; '.join(misfits)}" if misfits else None


def switch(role: str, on: bool) -> None:
    """Hands the fills of a role to SGLang, or takes them back, from the next step on."""
    adapter_for_installed().takeovers[role].switch(on)


def _warn_of_untried(adapter: Adapter, role: str) -> None:
    if role in adapter.untried:
        logger.warning(
            "sglang-nsa-plugin: %s is filled because it was asked for by name: %s. Start with %s 1 to "
            "have each fill compared",
            role,
            adapter.untried[role],
            options.CHECK_FLAG,
        )


def _warn_of_untested_release() -> None:
    warning = releases.why_untested(releases.SGLANG)
    if warning is not None:
        logger.warning("sglang-nsa-plugin: %s", warning)
