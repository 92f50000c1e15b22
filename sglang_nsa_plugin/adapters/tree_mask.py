"""SGLang 0.5.16 to 0.5.23: a tree mask of bs x n x n bytes for verify, instead of bs x n x context.

After each draft, SGLang writes a mask that says for every draft token which tokens it sees: one byte
for each token of the context (``FULL_MASK``). Some attention backends read it; NSA/DSA does not.
SGLang's other mode, ``QLEN_ONLY``, leaves the context out. Verify reads positions and the links of the
tree, which are the same in both modes. From 0.5.22 on, ``QLEN_ONLY`` also makes SGLang build a chain of
drafts in one launch instead of five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.adapter import Takeover
from sglang_nsa_plugin.adapters.hooks import Hook
from sglang_nsa_plugin.adapters.outcome import Outcome, Phase
from sglang_nsa_plugin.adapters.server_config import resolved
from sglang_nsa_plugin.containment import attempt, described
from sglang_nsa_plugin.log import logger_of, loses
from sglang_nsa_plugin.state import VERIFY_STATE, VERSION

logger = logger_of(__name__)

DECIDED = "_nsa_has_short_mask"  # on a backend of the target: whether its mask is short
LOST = "verify's short tree mask"


class TreeMask:
    """Makes the mask short where the plugin fills verify, and only while it does.

    Switching verify off in service, or its failure, gives SGLang its own step back, mask included.
    """

    def __init__(self) -> None:
        self._verify: Takeover | None = None  # None: the mask is SGLang's, whoever fills
        self._said = ""

    def install(self, verify: Takeover) -> None:
        """Hooks SGLang's function. Where that is not possible the mask stays SGLang's, and no more."""
        self._verify, self._said = verify, ""
        why_not = hooks.apply_now(HOOK)
        if why_not is not None:
            self._leave(why_not)

    def build(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around SGLang's function.

        Where a short mask cannot be had, for whatever reason, SGLang is asked again as it was asked.
        """
        built = attempt(self._build_short, self._give_up, original, args, kwargs)
        return original(*args, **kwargs) if built is None else built

    def _build_short(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any | None:
        """SGLang's verify input with a short mask, or None where the mask is to be SGLang's."""
        verify = self._verify
        if verify is None or not _is_on(verify.outcome):
            return None
        backend = kwargs["target_worker"].model_runner.attn_backend
        if DECIDED not in vars(backend):
            self._decide(verify, backend, kwargs)
        if not getattr(backend, DECIDED):
            return None
        short = type(kwargs["tree_mask_mode"]).QLEN_ONLY
        return original(*args, **{**kwargs, "tree_mask_mode": short})

    def _decide(self, verify: Takeover, backend: Any, asked: dict[str, Any]) -> None:
        """Once for each backend; adaptive speculation has several."""
        model_runner = asked["target_worker"].model_runner
        if backend in verify.backends:
            why_not = why_read(backend, model_runner, asked["topk"], asked["tree_mask_mode"])
        else:
            why_not = f"the plugin does not fill the target's {type(backend).__name__}"
        setattr(backend, DECIDED, why_not is None)
        if why_not is not None:
            self._say(f"SGLang's: {why_not}")
            return
        requests = max(VERIFY_STATE.captures, default=0)
        saved = requests * asked["num_draft_tokens"] * backend.max_context_len
        self._say(
            f"short while the plugin fills verify: up to {saved:,} bytes less to write and hold in a "
            f"step of {requests} requests, none of which NSA/DSA attention reads"
        )

    def _leave(self, why: str) -> None:
        self._say(f"SGLang's: {why}")
        self._verify = None

    def _give_up(self, error: Exception) -> None:
        loses(LOST)(error)
        self._leave(described(error))

    def _say(self, what: str) -> None:
        """Logs a decision, and reports it; the same one is logged once."""
        VERIFY_STATE.tree_mask = what
        if what != self._said:
            self._said = what
            logger.info("sglang-nsa-plugin %s: tree mask of verify: %s", VERSION, what)


def _is_on(outcome: Outcome) -> bool:
    return outcome.phase is Phase.ACTIVE and outcome.is_switched_on


def why_read(backend: Any, model_runner: Any, topk: int, mode: Any) -> str | None:
    """Who else needs the mask as SGLang makes it, or None where nobody does."""
    if mode.name != "FULL_MASK":
        return f"it is {mode.name}"
    if topk != 1:
        return f"drafts are trees, not chains (topk {topk})"
    if _own_mask(backend) is not None:
        return f"{type(backend).__name__} has a mask of its own"
    if getattr(model_runner, "watermark_state", None) is not None:  # since 0.5.22
        return "watermarking reads it (watermark_full_mask)"
    server_args = resolved(model_runner.server_args)
    if getattr(server_args, "enable_two_batch_overlap", False):
        return "two-batch overlap (enable_two_batch_overlap) cuts it in two"
    if getattr(server_args, "pp_size", 1) > 1:  # since 0.5.21 each stage makes it again
        return f"pipeline parallelism (pp_size {server_args.pp_size}) is not supported"
    return None


def _own_mask(backend: Any) -> Any | None:
    """The mask that SGLang fills in place where a backend has one, which NSA/DSA has not."""
    up_to_0_5_16 = getattr(backend, "get_verify_buffers_to_fill_after_draft", None)
    return getattr(backend, "verify_mask", None) if up_to_0_5_16 is None else up_to_0_5_16()[0]


TREE_MASK = TreeMask()
# It goes when SGLang makes no full mask for backends that read none.
HOOK = Hook(
    "sglang.srt.speculative.eagle_worker_common.build_eagle_verify_input",
    (
        "batch",
        "draft_input",
        "parent_list",
        "top_scores_index",
        "draft_tokens",
        "draft_probs",
        "target_worker",
        "topk",
        "num_steps",
        "num_draft_tokens",
        "tree_mask_mode",
        "device",
    ),
    TREE_MASK.build,
)
