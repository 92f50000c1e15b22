"""The fill as plain functions, for callers from Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import cpu, cuda


class BoundFill:
    """A fill that is bound to its tensors. Calling it runs it on the current stream.

    It can be neither copied nor pickled, because it writes to the memory that it was bound to. To fill
    other tensors, bind them.

    With ``cuda``, calls outside a capture go on as a CUDA graph after the first few: its launch takes
    less of the host's time than that of the kernel.

    Attributes:
        args: the arguments; they keep the tensors alive.
        backend: the name of the implementation.
    """

    def __init__(self, args: FillArgs, backend: str, run: Callable[[], None]) -> None:
        self.args = args
        self.backend = backend
        self._run = run

    def __call__(self) -> None:
        """Runs the fill."""
        self._run()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses copy.copy, copy.deepcopy and pickle: a copy would fill the tensors of the original."""
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled, because it is bound to the memory of "
            "its tensors: copy its args (copy.deepcopy(fill.args)) and call bind() with them"
        )


def bind(args: FillArgs, backend: str = "auto") -> BoundFill:
    """Binds ``args`` once, to be filled many times, also inside a captured CUDA graph.

    Raises:
        TypeError: ``args`` is not a :class:`FillArgs`.
        ValueError: ``backend`` is not one of auto, cuda, cpu, triton, torch.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
    """
    if not isinstance(args, FillArgs):
        raise TypeError(f"args: must be a FillArgs, got {type(args).__name__}")
    choice = dispatch.choose(backend, args.device)
    return BoundFill(args, choice.name, choice.bind(args))


def fill(args: FillArgs, backend: str = "auto") -> BoundFill:
    """Binds ``args``, fills once and returns the bound fill. Errors as :func:`bind`."""
    bound = bind(args, backend)
    bound()
    return bound


def fill_draft_extend_metadata_cuda(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
) -> torch.Tensor:
    """Expands the lengths of a ragged batch to rows: ``max(L - q + 1 + j, 0)`` and its clamp.

    Args:
        extend_seq_lens: q, the rows per request, int32 or int64 [bs].
        seq_lens: L, int32 or int64 [bs].
        nsa_index_topk: the clamp.
        out_seqlens_expanded: int32 [rows], for row j of each request. Rows after the sum of q become 0.
        out_nsa_cache_seqlens: int32 [rows], ``min(out_seqlens_expanded, nsa_index_topk)``.
        use_adaptive: take as many blocks as the rows need; otherwise one block. A block serves 256 rows,
            so up to 64 requests of 4 rows both are the same. Beyond that more blocks were faster at each
            size measured, 1.2 times at 128 requests and 1.7 at 1024 on an H200 (``bench.expand`` in
            ``integration/results/bench-h200-0.5.17.json``).

    Returns:
        int32 scalar tensor on the device, the number of rows in use: ``min(sum of q, rows)``. Nothing
        synchronises.

    CPU tensors go to the CPU twin. Errors as :class:`FillArgs`, with the names of these parameters.
    """
    args = _ragged_lengths(
        extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens
    )
    assert args.row_count is not None
    if args.device.type == "cpu":
        cpu.bind(args)()
    else:
        cuda.bind(args, max_blocks=0 if use_adaptive else 1)()
    return args.row_count[0]


def fill_draft_extend_metadata_cuda_adaptive(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    """:func:`fill_draft_extend_metadata_cuda` with ``use_adaptive=True``."""
    return fill_draft_extend_metadata_cuda(
        extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens
    )


# Fields of FillArgs by the names that the functions above give them.
PARAMETERS = {
    "extend_lens": "extend_seq_lens",
    "index_topk": "nsa_index_topk",
    "seqlens_expanded": "out_seqlens_expanded",
    "nsa_cache_seqlens": "out_nsa_cache_seqlens",
}


def _ragged_lengths(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    index_topk: int,
    seqlens_expanded: torch.Tensor,
    nsa_cache_seqlens: torch.Tensor,
) -> FillArgs:
    """A fill of lengths alone; outputs that the caller did not ask for share one scratch tensor."""
    for name, value in (
        ("extend_seq_lens", extend_seq_lens),
        ("seq_lens", seq_lens),
        ("out_seqlens_expanded", seqlens_expanded),
        ("out_nsa_cache_seqlens", nsa_cache_seqlens),
    ):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, got {type(value).__name__}")
    bs, rows = seq_lens.numel(), seqlens_expanded.numel()
    scratch = torch.empty(2 * bs + rows + 3, dtype=torch.int32, device=seq_lens.device)
    cache_seqlens, cu_seqlens_k, nsa_cu_seqlens_k, row_count = scratch.split([bs, bs + 1, rows + 1, 1])
    fields: dict[str, Any] = {
        "seq_lens": seq_lens,
        "req_pool_indices": None,
        "req_to_token": None,
        "extend_lens": extend_seq_lens,
        "index_topk": index_topk,
        "page_size": 1,
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "seqlens_expanded": seqlens_expanded,
        "nsa_cache_seqlens": nsa_cache_seqlens,
        "nsa_cu_seqlens_k": nsa_cu_seqlens_k,
        "row_count": row_count,
    }
    try:
        return FillArgs(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(_in_caller_names(str(error))) from None


def _in_caller_names(message: str) -> str:
    """An error of :class:`FillArgs` with this function's parameters in place of the fields."""
    return re.sub(r"\w+", lambda word: PARAMETERS.get(word[0], word[0]), message)
