"""Is the fill in place? Asked once a scheduler is made: by then SGLang has captured its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_nsa_plugin.adapters import install, wide_tables
from sglang_nsa_plugin.adapters.adapter import Request
from sglang_nsa_plugin.adapters.hooks import why_replaced
from sglang_nsa_plugin.adapters.outcome import report_not_expected
from sglang_nsa_plugin.adapters.server_config import resolved
from sglang_nsa_plugin.adapters.supported import ONE_STEP
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import loses
from sglang_nsa_plugin.state import DECODE, DRAFT_DECODE, VERIFY

NO_DRAFT_MODEL = "the draft model runs on the last pipeline stage, which this rank is not of"


def conclude(scheduler: Any, server_args: Any, requests: Mapping[str, Request]) -> None:
    """Says for each role in one line whether it is filled from now on; if not, leaves it to SGLang.

    What was decided before, such as a server without speculation, was logged then.

    Raises:
        BackendUnavailableError: a backend was asked for by name and fills nothing.
    """
    adapter = install.adapter_for_installed()
    for role, takeover in adapter.takeovers.items():
        if not takeover.outcome.is_open:
            continue
        why_not = adapter.why_not_in_place(role)
        if why_not is None:
            takeover.outcome.report_in_place()
            continue
        if role == DRAFT_DECODE and why_replaced(adapter.parts_of(role).hooks) is not None:
            # SGLang's own fill runs from now on, and not the hook that does without the wide table.
            for multi_step in takeover.backends:
                wide_tables.restore(multi_step.attn_backends[0])
        why_idle = None if takeover.backends else _why_nothing_to_fill(role, scheduler, server_args)
        takeover.release()
        if why_idle is not None:
            report_not_expected([role], why_idle)
        else:
            asked_for = requests[role].asked_for
            takeover.outcome.step_aside(asked_for, f"{why_not} ({_configuration(server_args)})")
    savings = loses("the line on memory that is saved")
    attempt(wide_tables.report_savings, savings, scheduler, adapter.takeovers.values())


def _why_nothing_to_fill(role: str, scheduler: Any, server_args: Any) -> str | None:
    """Why SGLang makes no metadata of this role in this process, or None where it may."""
    if role not in (VERIFY, DECODE) and not _hosts_draft_model(scheduler):
        return NO_DRAFT_MODEL
    if role == DRAFT_DECODE and getattr(resolved(server_args), "speculative_num_steps", None) == 1:
        return ONE_STEP
    return None


def _hosts_draft_model(scheduler: Any) -> bool:
    """Since 0.5.19 only the last pipeline stage does; the others have a worker without one, or none."""
    worker = getattr(scheduler, "draft_worker", scheduler)
    return worker is not None and getattr(worker, "_hosts_draft", True)


def _configuration(server_args: Any) -> str:
    """What decides in SGLang whether the draft model, or the only one, is captured with NSA/DSA."""
    arguments = resolved(server_args)
    algorithm = getattr(arguments, "speculative_algorithm", None)
    of_draft = "draft attention backend" if algorithm else "attention backend"
    settings = {
        "speculative algorithm": algorithm,
        of_draft: getattr(arguments, "speculative_draft_attention_backend", None)
        or getattr(arguments, "attention_backend", None),
        "CUDA graphs": "disabled" if _has_no_graphs(arguments) else None,
    }
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _has_no_graphs(arguments: Any) -> bool:
    graphs = getattr(arguments, "cuda_graph_config", None)
    if graphs is not None:
        return bool(graphs.decode.backend == "disabled")
    return bool(getattr(arguments, "disable_cuda_graph", False))
