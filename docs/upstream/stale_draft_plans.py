"""With more than 3 steps, three of SGLang's draft-decode backends keep the plans of their capture.

    python stale_draft_plans.py [--steps 5] [--requests 64] [--prompt 70000] [--time]

Needs an NVIDIA GPU and an installed SGLang, 0.5.15 or later; no model, no server, no other package.

It makes SGLang's own DeepseekSparseAttnMultiStepBackend, has it build the metadata of a capture, where
every request has one token, and then prepare the replay of a batch. For each draft step it compares
DeepGEMM's schedule and the top-k plan with those of the batch's lengths, and runs the top-k on them.
Exit code: 0 when all are right, 1 when some are not.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

PAGE, TOPK = 64, 2048
SHORT = 200  # tokens of every request but the first
PLANLESS = 48  # up to fewer than so many requests, by release and GPU, the top-k takes no plan
HEADS, HEAD_DIM, KEY_BYTES = 64, 128, 132  # of the indexer; a key is fp8 with its scale


def main() -> int:
    """Prints what each draft step's graph would read."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="--speculative-num-steps of a server")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=70_000, help="tokens of the first request")
    parser.add_argument("--time", action="store_true", help="also the logits' time with both schedules")
    asked = parser.parse_args()
    if asked.steps < 2:
        parser.error("--steps: must be 2 or more, or there is no draft-decode")
    device = torch.device("cuda", torch.cuda.current_device())
    lengths = torch.full((asked.requests,), SHORT, dtype=torch.int64, device=device)
    lengths[0] = asked.prompt
    print(
        f"SGLang {version('sglang')}, {torch.cuda.get_device_name()}: {asked.steps} steps, "
        f"{asked.requests} requests, one of {asked.prompt:,} tokens, the others of {SHORT}"
    )
    backends = replayed(device, asked.steps, lengths)
    steps = [look_at(backend, lengths) for backend in backends]
    for number, step in enumerate(steps):
        print(f"draft step {number}: " + ", ".join(f"{what} {found}" for what, found in step.items()))
    if asked.time:
        for number, backend in enumerate(backends):
            kept, fresh = logits_times(backend, lengths)
            print(
                f"draft step {number}: logits {kept:.0f} us, with the schedule of the batch {fresh:.0f}"
            )
    wrong = [number for number, step in enumerate(steps) if "WRONG" in step.values()]
    print(f"WRONG in draft steps {', '.join(map(str, wrong))}" if wrong else "all right")
    return 1 if wrong else 0


def replayed(device: torch.device, steps: int, lengths: torch.Tensor) -> list[Any]:
    """The backends of the draft steps after a capture and the preparation of a replay."""
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnMultiStepBackend

    requests, width = len(lengths), -(-int(lengths.max()) // PAGE) * PAGE + PAGE
    pages = torch.arange(requests * width, dtype=torch.int32, device=device).view(requests, width)
    slots = torch.cat([torch.zeros_like(pages[:1]), PAGE + pages])  # row 0 is for padding
    rows = torch.arange(1, requests + 1, dtype=torch.int64, device=device)
    server_args = configured(steps)
    with one_rank():
        draft = DeepseekSparseAttnMultiStepBackend(runner(device, server_args, slots), 1, steps)
        draft.init_cuda_graph_state(requests, requests)
        draft.init_forward_metadata_out_graph(batch(torch.ones_like(lengths), rows), in_capture=True)
        draft.init_forward_metadata_out_graph(batch(lengths, rows))
    for backend in draft.attn_backends:
        backend.forward_metadata = backend.decode_cuda_graph_metadata[requests]
    return list(draft.attn_backends)


def look_at(backend: Any, lengths: torch.Tensor) -> dict[str, str]:
    """What one draft step's graph would read, beside what belongs to these lengths."""
    kept = backend.forward_metadata
    found = {"lengths": verdict(kept.cache_seqlens_int32.equal(lengths.int()))}
    found["schedule"] = verdict(kept.paged_mqa_schedule_metadata.equal(fresh_schedule(kept)))
    plan = backend._build_topk_v2_plan(kept.dsa_seqlens_expanded)
    if plan is not None:  # else SGLang was told to take its older top-k
        is_same = len(lengths) > PLANLESS and same_plan(kept.topk_v2_plan, plan)
        found["top-k plan"] = verdict(is_same) if len(lengths) > PLANLESS else "not looked at"
        found["top-k of the first request"] = (
            f"{selected(kept, lengths)} of {min(TOPK, int(lengths[0]))}"
        )
    return found


def verdict(is_right: bool) -> str:
    """As it is printed."""
    return "right" if is_right else "WRONG"


def fresh_schedule(metadata: Any) -> torch.Tensor:
    """DeepGEMM's schedule of the lengths that the metadata holds now."""
    import deep_gemm

    schedule: torch.Tensor = deep_gemm.get_paged_mqa_logits_metadata(
        metadata.paged_mqa_ctx_lens_2d, PAGE, deep_gemm.get_num_sms()
    )
    return schedule


def same_plan(kept: torch.Tensor, fresh: torch.Tensor) -> bool:
    """Row 0 is a threshold and the number of items, which follow in any order."""
    items = int(fresh[0, 1])
    listed = [sorted(map(tuple, plan[1 : 1 + items].tolist())) for plan in (kept, fresh)]
    return kept[0].equal(fresh[0]) and listed[0] == listed[1]


def selected(metadata: Any, lengths: torch.Tensor) -> int:
    """How many tokens of the first request SGLang's top-k selects, by random logits."""
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import _topk_transform_v2_paged

    logits = torch.randn(len(lengths), metadata.real_page_table.shape[1] * PAGE, device=lengths.device)
    with uninitialized_memory_filled():
        slots = _topk_transform_v2_paged(logits, metadata.dsa_seqlens_expanded, TOPK, metadata)[0]
    of_request = slots[(slots >= PAGE) & (slots < PAGE + lengths[0])]  # as `replayed` lays them out
    return of_request.unique().numel()


@contextlib.contextmanager
def uninitialized_memory_filled() -> Iterator[None]:
    """Since 0.5.19 the top-k's output is allocated and not filled: a row that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def logits_times(backend: Any, lengths: torch.Tensor) -> tuple[float, float]:
    """Microseconds of the indexer's logits with the schedule that is there, and with a fresh one."""
    import deep_gemm

    kept, requests, device = backend.forward_metadata, len(lengths), lengths.device
    blocks = int(kept.real_page_table.max()) + 1
    keys = torch.zeros((blocks, PAGE, 1, KEY_BYTES), dtype=torch.uint8, device=device)
    queries = torch.randn(requests, 1, HEADS, HEAD_DIM, device=device).to(torch.float8_e4m3fn)
    weights = torch.rand(requests, HEADS, device=device)
    widest = kept.real_page_table.shape[1] * PAGE

    def logits(schedule: torch.Tensor) -> Callable[[], object]:
        return lambda: deep_gemm.fp8_paged_mqa_logits(
            queries,
            keys,
            weights,
            kept.paged_mqa_ctx_lens_2d,
            kept.real_page_table,
            schedule,
            widest,
            clean_logits=False,
        )

    return us_of(logits(kept.paged_mqa_schedule_metadata)), us_of(logits(fresh_schedule(kept)))


def us_of(run: Callable[[], object], times: int = 50) -> float:
    """Microseconds of one run."""
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / times


def batch(lengths: torch.Tensor, rows: torch.Tensor) -> SimpleNamespace:
    """What EAGLEDraftCudaGraphRunner hands to the backend."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        batch_size=len(lengths),
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=rows,
        seq_lens=lengths,
        seq_lens_sum=int(lengths.sum()),
        seq_lens_cpu=lengths.cpu(),
        out_cache_loc=None,
        spec_info=None,
        num_padding=0,
    )


def configured(steps: int) -> Any:
    """This process's server arguments."""
    from sglang.srt.runtime_context import get_context

    return (
        get_context()
        .override_server_args(
            page_size=PAGE,
            attention_backend="dsa",
            dsa_prefill_backend="flashmla_sparse",
            dsa_decode_backend="flashmla_sparse",
            speculative_algorithm="EAGLE",
            speculative_num_steps=steps,
            speculative_eagle_topk=1,
            speculative_num_draft_tokens=steps + 1,
        )
        .install()
    )


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """The ranks that torch.distributed would tell; not every release asks for all of them."""
    from sglang.srt.runtime_context import get_parallel

    with contextlib.ExitStack() as stack:
        for rank in ({"attn_tp_size": 1}, {"attn_dcp_rank": 0}):
            with contextlib.suppress(ValueError):
                stack.enter_context(get_parallel().override(**rank))
        yield


def runner(device: torch.device, server_args: Any, slots: torch.Tensor) -> SimpleNamespace:
    """A draft model runner of DeepSeek-V3.2's geometry: what the backend's constructor asks for."""
    hf_config = SimpleNamespace(
        architectures=["DeepseekV32ForCausalLM"],
        index_topk=TOPK,
        index_n_heads=HEADS,
        index_head_dim=HEAD_DIM,
    )
    model_config = SimpleNamespace(
        hf_config=hf_config,
        context_len=slots.shape[1] - PAGE,
        num_attention_heads=64,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        kv_lora_rank=512,
    )
    return SimpleNamespace(
        device=str(device),
        is_draft_worker=True,
        server_args=server_args,
        page_size=PAGE,
        kv_cache_dtype=torch.bfloat16,
        max_running_requests=slots.shape[0] - 1,
        draft_attention_backend=None,
        hisparse_coordinator=None,
        model_config=model_config,
        token_to_kv_pool=SimpleNamespace(
            dtype=torch.bfloat16, dsa_kv_cache_store_fp8=False, kv_cache_dim=576
        ),
        req_to_token_pool=SimpleNamespace(size=slots.shape[0] - 1, req_to_token=slots),
    )


if __name__ == "__main__":
    sys.exit(main())
