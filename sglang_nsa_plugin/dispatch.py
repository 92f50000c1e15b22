"""Chooses the implementation of the fill, once, and can say why.

Candidates are tried in a fixed order. Each says whether it can run here, and then has to pass the
self-test. The choice is final: an error in service is an error, not a reason to take another one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_nsa_plugin import self_test
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kpool_args import KPoolArgs

CANDIDATES = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
BACKENDS = ("auto", "cuda", "cpu", "triton", "torch")
# Where an implementation has the second fill of models that pool the keys of their index.
KPOOL_MODULES = {"cuda": "kpool_compiled", "cpu": "kpool_compiled", "torch": "kpool_torch"}


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Choice:
    """An implementation, and why it was chosen.

    ``refused`` maps each candidate that was tried before it to the reason why it cannot run here.
    ``bind_kpool`` is its k-pooling fill, where one was asked for. ``bind_no_op`` binds the launch of an
    empty kernel; None where the implementation has none.
    """

    name: str
    bind: Callable[[FillArgs], Callable[[], None]]
    reason: str
    refused: dict[str, str]
    bind_kpool: Callable[[KPoolArgs], Callable[[], None]] | None = None
    bind_no_op: Callable[[torch.device], Callable[[], None]] | None = None


def choose(backend: str, device: torch.device, with_kpool: bool = False) -> Choice:
    """The implementation for tensors on ``device``. ``backend`` is one of :data:`BACKENDS`.

    With ``with_kpool`` it has a k-pooling fill, too.

    Raises:
        ValueError: ``backend`` is not one of them, or there is no implementation for the device.
        BackendUnavailableError: the backend was asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if device.type not in CANDIDATES:
        known = " or ".join(CANDIDATES)
        raise ValueError(f"device: a fill runs on {known} tensors, got {device}")
    return _choose(backend, device.type, device.index, with_kpool)


@functools.cache
def _choose(backend: str, device_type: str, index: int | None, with_kpool: bool) -> Choice:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    candidates = CANDIDATES[device_type]
    if backend != "auto":
        return _named(backend, device, with_kpool)
    refused: dict[str, str] = {}
    for name in candidates:
        why_not = _why_not(name, device, with_kpool)
        if why_not is None:
            return _choice(name, _reason(name, refused), refused, with_kpool)
        refused[name] = why_not
    raise BackendUnavailableError(f"no implementation can run on {device}: {_listed(refused)}")


def _named(backend: str, device: torch.device, with_kpool: bool) -> Choice:
    why_not = _why_not(backend, device, with_kpool)
    if why_not is not None:
        raise BackendUnavailableError(
            f"the metadata backend {backend!r} was asked for by name and cannot run: {why_not}. "
            "Use 'auto' to let another implementation step in, or 'off' for SGLang's own fill"
        )
    return _choice(backend, "asked for by name", {}, with_kpool)


def _choice(name: str, reason: str, refused: dict[str, str], with_kpool: bool) -> Choice:
    bind_kpool = _module(KPOOL_MODULES[name]).bind if with_kpool else None
    bind_no_op = getattr(_module(name), "bind_no_op", None)
    return Choice(name, _bind_of(name), reason, refused, bind_kpool, bind_no_op)


def _why_not(name: str, device: torch.device, with_kpool: bool) -> str | None:
    why_not = why_unavailable(name, device)
    return why_kpool_unavailable(name, device) if why_not is None and with_kpool else why_not


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
def why_unavailable(name: str, device: torch.device) -> str | None:
    """Why the implementation cannot serve tensors on ``device``, or None if it can."""
    if name not in CANDIDATES[device.type]:
        return f"it does not run on {device.type} tensors"
    if name == "torch":
        return None
    try:
        module = _module(name)
    except ImportError as error:
        return f"it cannot be imported: {error}"
    if hasattr(module, "why_unavailable"):
        why_not: str | None = module.why_unavailable()
        if why_not is not None:
            return why_not
    return self_test.why_failed(module.bind, device, _errors_of(module))


def why_wrong_by_request(name: str, device: torch.device) -> str | None:
    """How an implementation that runs on ``device`` differs from the reference by request, or None.

    Not asked by :func:`choose`: no other fill runs that code.
    """
    module = _module(name)
    return self_test.why_failed(module.bind, device, _errors_of(module), by_request=True)


def _errors_of(module: object) -> tuple[type[Exception], ...]:
    errors: tuple[type[Exception], ...] = getattr(module, "ERRORS", ())
    return errors


@functools.cache
def why_kpool_unavailable(name: str, device: torch.device) -> str | None:
    """The same of the k-pooling fill of an implementation that can serve other fills."""
    if name not in KPOOL_MODULES:
        return "it has no k-pooling fill"
    return (
        None
        if name == "torch"
        else self_test.why_kpool_failed(_module(KPOOL_MODULES[name]).bind, device)
    )
