"""What SGLang's attention backends need from a launched process, without a server, a model or a GPU.

A configuration, a draft model runner with DeepSeek-V3.2's geometry, and on the CPU stubs for what a CUDA
device would answer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang_nsa_plugin import options, plugin
from sglang_nsa_plugin.harness.inputs import Inputs
from sglang_nsa_plugin.state import DECODE

# Values of decode_impl for which the backend or its metadata needs a CUDA library.
NEEDS_CUDA = ("flashmla_kv", "trtllm")
# Where releases have the kernel that copies metadata from one draft step to the others.
COPY_KERNELS = (
    "sglang.jit_kernel.fused_metadata_copy",
    "sglang.kernels.ops.attention.fused_metadata_copy",
    "sglang.kernels.ops.attention.dsa.fused_metadata_copy",
)
# Who prints at each step that such a kernel is missing.
COPIERS = (
    "sglang.srt.layers.attention.dsa_backend",
    "sglang.srt.layers.attention.dsa.dsa_metadata_manager",
)


def parameters(function: Callable[..., Any]) -> set[str]:
    """The names of a function's parameters, which differ between releases."""
    return set(inspect.signature(function).parameters)


def activate_plugin(backend: str, check_every: int, role: str, wide_tables: str | None = None) -> None:
    """What the plugin does at the start of a server with these flags; one for decode has no drafts."""
    algorithm = None if role == DECODE else "EAGLE"
    server_args = SimpleNamespace(speculative_algorithm=algorithm, attention_backend="dsa")
    setattr(server_args, options.ATTRIBUTE, backend)
    setattr(server_args, options.CHECK_ATTRIBUTE, check_every)
    setattr(server_args, options.ROLES_ATTRIBUTE, (role,))
    setattr(server_args, options.WIDE_ATTRIBUTE, wide_tables)
    plugin.activate(server_args)


def validate_device(device: torch.device, decode_impl: str) -> None:
    """SGLang chooses its path by the GPUs of the process, not by the tensors: the two must agree."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: must be cpu or cuda, got {device}")
    if (device.type == "cuda") != torch.cuda.is_available():
        raise ValueError(
            f"device: got {device}, but torch.cuda.is_available() is {torch.cuda.is_available()}; "
            "SGLang fills where the process sees a GPU: use cuda there, else hide the GPU with an "
            "empty CUDA_VISIBLE_DEVICES and use cpu"
        )
    if device.type == "cpu":
        validate_interpreter()
        if decode_impl in NEEDS_CUDA:
            raise ValueError(
                f"decode_impl: {', '.join(NEEDS_CUDA)} call CUDA libraries, got {decode_impl} "
                "for the CPU; use flashmla_sparse there"
            )


def why_unavailable(decode_impl: str) -> str | None:
    """Why this decode implementation cannot run here, or None. Since 0.5.23 FlashMLA is a package."""
    if decode_impl != "flashmla_kv":
        return None
    try:
        importlib.import_module("sglang.kernels.ops.attention.flash_mla_interface")
    except ModuleNotFoundError as error:
        return None if (error.name or "").startswith("sglang") else f"{error.name} is not installed"
    return None


def validate_interpreter() -> None:
    """Triton decides on import whether kernels, including its own functions, are interpreted."""
    from triton.language import cumsum
    from triton.runtime.jit import JITFunction

    given = os.environ.get("TRITON_INTERPRET")
    if given != "1" or isinstance(cumsum, JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET: must be 1 before the process first imports Triton, to run SGLang's "
            f"kernels on the CPU; got {given!r}{', set too late' if given == '1' else ''}"
        )


@contextlib.contextmanager
def stub_process(device: torch.device) -> Iterator[None]:
    """What a launched process or a GPU would supply to SGLang's backend.

    Everywhere: attention TP of size 1, which is otherwise read from torch.distributed. On the CPU also:
    the compute capability 9.0, which the constructor asks for; no top-k plan, which needs a CUDA kernel;
    a launcher of the one Triton kernel that accepts CPU tensors; and not the CUDA kernel that copies
    draft-decode's metadata, which SGLang would try to compile at each step before it copies by torch,
    and would print so.
    """
    from sglang.srt.environ import envs
    from sglang.srt.layers.attention import dsa_backend
    from sglang.srt.runtime_context import get_parallel

    with contextlib.ExitStack() as stack:
        stack.enter_context(get_parallel().override(attn_tp_size=1))
        with contextlib.suppress(
            ValueError
        ):  # a release without that rank; a target's backend asks for it
            stack.enter_context(get_parallel().override(attn_dcp_rank=0))
        if device.type == "cpu":
            stack.enter_context(envs.SGLANG_OPT_USE_TOPK_V2.override(False))
            stack.enter_context(
                mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))
            )
            launcher = on_cpu(dsa_backend.seqlens_expand_triton)
            stack.enter_context(mock.patch.object(dsa_backend, "seqlens_expand_triton", launcher))
            stack.enter_context(without_copy_kernels())
            stack.enter_context(kpool_plans())
        yield


@contextlib.contextmanager
def kpool_plans() -> Iterator[None]:
    """SGLang's functions for a pooled index run, which ask for CUDA, in releases that have them."""
    plan = "sglang.srt.layers.attention.dsa.kpool_plan"
    if plan not in sys.modules:  # imported with the backend
        yield
        return
    with mock.patch.object(sys.modules[plan], "is_cuda", return_value=True):
        yield


@contextlib.contextmanager
def kpool_fusion() -> Iterator[None]:
    """The constructor of a backend with a pooled index chooses SGLang's fused kernels, as on CUDA.

    Triton's interpreter takes a second for each of them, so where it is not asked to, by
    :func:`launch_fused_on_cpu`, SGLang fills by torch.
    """
    manager = "sglang.srt.layers.attention.dsa.dsa_metadata_manager"
    with mock.patch.object(importlib.import_module(manager), "is_cuda", return_value=True):
        yield


def launch_fused_on_cpu(backend: Any) -> None:
    """Triton's interpreter runs the fused kernels that this backend has chosen."""
    backend.experimental_kpool_metadata_fusion = True
    for name in ("_fused_decode_metadata", "_fused_verify_metadata", "_fused_draft_extend_metadata"):
        setattr(backend, name, on_cpu(getattr(backend, name)))


@contextlib.contextmanager
def without_copy_kernels() -> Iterator[None]:
    """SGLang copies draft-decode's metadata by torch, and does not print so at each step."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_missing(COPY_KERNELS))
        for name in sys.modules.keys() & set(COPIERS):
            stack.enter_context(mock.patch.object(sys.modules[name], "print"))
        yield


@contextlib.contextmanager
def _missing(modules: Iterable[str]) -> Iterator[None]:
    """Makes an import of these modules fail."""
    names = tuple(modules)
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def on_cpu(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher of an interpreted kernel, inside which CPU tensors look like CUDA tensors."""

    @functools.wraps(launcher)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)):
            return launcher(*args, **kwargs)

    return call


def publish_server_args(**fields: Any) -> Any:
    """Makes a ServerArgs with these fields this process's configuration."""
    from sglang.srt import server_args as module

    context: Any = None
    with contextlib.suppress(ModuleNotFoundError):  # up to 0.5.13
        from sglang.srt.runtime_context import get_context

        context = get_context()
    if hasattr(context, "override_server_args"):
        return context.override_server_args(**fields).install()
    server_args = module.ServerArgs(model_path="dummy")
    for name, value in fields.items():
        setattr(server_args, name, value)
    module.set_global_server_args_for_scheduler(server_args)
    return server_args


def model_runner(
    device: torch.device,
    server_args: Any,
    inputs: Inputs,
    context_len: int,
    page_size: int,
    index_topk: int,
    decode_impl: str,
    index_kpool: int,
) -> SimpleNamespace:
    """A draft runner of DeepSeek-V3.2's geometry: the attributes that the constructor reads."""
    fp8 = decode_impl == "flashmla_kv"
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    hf_config = SimpleNamespace(
        architectures=["DeepseekV32ForCausalLM"],
        index_topk=index_topk,
        index_n_heads=64,
        index_head_dim=128,
        index_kpool=index_kpool,
    )
    return SimpleNamespace(
        device=str(device),
        is_draft_worker=True,
        server_args=server_args,
        page_size=page_size,
        kv_cache_dtype=dtype,
        max_running_requests=inputs.max_bs,
        draft_attention_backend=None,
        shared_read_done_event=None,
        hisparse_coordinator=None,
        model_config=SimpleNamespace(
            hf_config=hf_config,
            context_len=context_len,
            num_attention_heads=64,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            kv_lora_rank=512,
        ),
        token_to_kv_pool=SimpleNamespace(
            dtype=dtype,
            dsa_kv_cache_store_fp8=fp8,
            nsa_kv_cache_store_fp8=fp8,  # up to 0.5.12
            kv_cache_dim=656 if fp8 else 576,
            index_page_size=page_size // index_kpool,  # since 0.5.22
        ),
        req_to_token_pool=SimpleNamespace(
            size=inputs.req_to_token.shape[0] - 1, req_to_token=inputs.req_to_token
        ),
    )
