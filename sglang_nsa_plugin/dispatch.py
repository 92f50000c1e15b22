"""Chooses the implementation of the fill, once, and can say why.

Candidates are tried in a fixed order. Each says whether it can run here and then proves itself: it
fills a small case with every edge in it, and every tensor must equal what the torch reference writes.
After the choice nothing switches: an error in service is an error.
"""

from __future__ import annotations

import functools
import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import torch as reference

CANDIDATES = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
BACKENDS = ("auto", "cuda", "cpu", "triton", "torch")
POISON = -987_654_321


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Choice:
    """An implementation and the reasons for it.

    ``refused`` maps each candidate that was tried before it to why it cannot run here.
    """

    name: str
    bind: Callable[[FillArgs], Callable[[], None]]
    reason: str
    refused: dict[str, str]


def choose(backend: str, device: torch.device) -> Choice:
    """The implementation for tensors on ``device``.

    ``backend`` is "auto" or a name of :data:`BACKENDS`.

    Raises:
        ValueError: ``backend`` is no such name, or there is no implementation for the device.
        BackendUnavailableError: the backend was asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if device.type not in CANDIDATES:
        known = " or ".join(CANDIDATES)
        raise ValueError(f"device: a fill runs on {known} tensors, got {device}")
    return _choose(backend, device.type, device.index)


@functools.cache
def _choose(backend: str, device_type: str, index: int | None) -> Choice:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    candidates = CANDIDATES[device_type]
    if backend != "auto":
        return _named(backend, device)
    refused: dict[str, str] = {}
    for name in candidates:
        why_not = refusal(name, device)
        if why_not is None:
            return Choice(name, _bind_of(name), _reason(name, refused), refused)
        refused[name] = why_not
    raise BackendUnavailableError(f"no implementation can run on {device}: {_listed(refused)}")


def _named(backend: str, device: torch.device) -> Choice:
    why_not = refusal(backend, device)
    if why_not is not None:
        raise BackendUnavailableError(
            f"the metadata backend {backend!r} was asked for by name and cannot run: {why_not}. "
            "Use 'auto' to let another implementation step in, or 'off' for SGLang's own fill"
        )
    return Choice(backend, _bind_of(backend), "asked for by name", {})


def _reason(name: str, refused: dict[str, str]) -> str:
    return f"after refusing {_listed(refused)}" if refused else f"first choice, {name} self-test passed"


def _listed(refused: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in refused.items())


def _bind_of(name: str) -> Callable[[FillArgs], Callable[[], None]]:
    bind: Callable[[FillArgs], Callable[[], None]] = _module(name).bind
    return bind


def _module(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"sglang_nsa_plugin.kernels.{name}")


@functools.cache
def refusal(name: str, device: torch.device) -> str | None:
    """Why the implementation cannot serve tensors on ``device``, in words, or None if it can."""
    if name not in CANDIDATES[device.type]:
        return f"it does not run on {device.type} tensors"
    if name == "torch":
        return None
    try:
        module = _module(name)
    except ImportError as error:
        return f"it cannot be imported: {error}"
    unavailable = getattr(module, "unavailable", None)
    why_not: str | None = unavailable() if unavailable is not None else None
    if why_not is not None:
        return why_not
    return _self_test(module.bind, device, getattr(module, "ERRORS", ()))


def _self_test(
    bind: Callable[[FillArgs], Callable[[], None]],
    device: torch.device,
    errors: tuple[type[Exception], ...],
) -> str | None:
    """Compares fills of every kind with the reference; the first difference in words.

    ``errors`` are those of the implementation's own, beside RuntimeError, that say it cannot run.
    """
    cannot_run: tuple[type[Exception], ...] = (RuntimeError, *errors)
    for ragged, times in ((False, 1), (True, 1), (False, 75), (True, 75)):
        expected = small_case(device, ragged, times)
        actual = small_case(device, ragged, times)
        reference.fill(expected)
        try:
            bind(actual)()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except cannot_run as error:
            return f"its self-test failed: {textwrap.shorten(str(error), 300)}"
        for name, tensor in actual.outputs().items():
            if not torch.equal(tensor, expected.outputs()[name]):
                return f"its self-test filled {name} with other values than the torch reference"
    return None


def small_case(device: torch.device, ragged: bool, times: int = 1) -> FillArgs:
    """Four requests with the edges that matter, outputs poisoned: L < q, L = 0, over the top-k, a
    request outside the pool, a length over the table, rows behind the last request.

    ``times`` repeats them: 75 times are more requests than any implementation takes at once.
    """
    bs, rows, width, page = 4 * times, 12 * times, 40, 8

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values * times, dtype=dtype, device=device)

    args = FillArgs(
        seq_lens=tensor([1, 37, 0, 90]),
        req_pool_indices=tensor([2, 0, 1, 9]),
        req_to_token=torch.arange(4 * 44, dtype=torch.int32, device=device).view(4, 44),
        extend_lens=3,
        index_topk=36,
        page_size=page,
        **poisoned_outputs(bs, rows, width, page, device),
        mqa_schedule=torch.full((6, 2), POISON, dtype=torch.int32, device=device),
        mqa_remainder_last=times > 1,
    )
    if not ragged:
        return args
    row_count = torch.full((1,), POISON, dtype=torch.int32, device=device)
    widths = tensor([2, 4, 0, 3], torch.int32)
    return replace(args, extend_lens=widths, row_count=row_count, mqa_schedule=None)


def poisoned_outputs(
    requests: int, rows: int, width: int, page_size: int, device: torch.device
) -> dict[str, Any]:
    """The lengths and tables of a fill by their names in FillArgs, :data:`POISON` in each cell."""
    shapes = {
        "cache_seqlens": (requests,),
        "cu_seqlens_k": (requests + 1,),
        "seqlens_expanded": (rows,),
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
        "ctx_lens": (rows, 1),
        "page_table_1": (rows, width),
        "real_page_table": (rows, width // page_size),
    }
    return {
        name: torch.full(shape, POISON, dtype=torch.int32, device=device)
        for name, shape in shapes.items()
    }
