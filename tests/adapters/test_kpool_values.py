"""A k-pooling fill writes what SGLang's own backends and kernels write, in releases that have them.

SGLang's backend object makes the metadata of each role on CPU tensors. Its functions for k-pooling ask
for CUDA, and are told that it is there; Triton's interpreter runs their kernel. DeepGEMM's schedule and
the top-k plan stay None.

The interpreter takes 10 to 50 ms for a batch of one to four requests, so that a run has few random ones.
``python -m integration.releases.kpool_values`` runs thousands of each role and keeps the counts.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from random import Random
from types import ModuleType
from unittest import mock

import pytest
import torch
from cpu_pair import CPU, on_the_cpu

from sglang_nsa_plugin import FillArgs
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
from sglang_nsa_plugin.harness.inputs import random_step
from sglang_nsa_plugin.kernels import kpool_torch
from sglang_nsa_plugin.kernels import torch as reference
from sglang_nsa_plugin.kpool_args import KPoolArgs
from sglang_nsa_plugin.self_test import POISON

pytestmark = on_the_cpu

PAGE = 64
BS = 8
FEW = (1, 2, 3, 4)  # requests of a random batch
RANDOM_BATCHES = 24  # of each role; the option --fuzz-batches asks for more
FUSED_EACH = 8  # one of so many random batches is also given to the fused kernel
# Where releases keep the fused kernels: 0.5.23, and before.
FUSED = (
    "sglang.kernels.ops.attention.dsa.kpool_metadata",
    "sglang.kernels.ops.attention.dsa_kpool_metadata",
)
ROLES = ("draft-decode", "verify", "draft-extend")
SHAPES = [
    {"index_kpool": 4, "draft_tokens": 4, "index_topk": 128},  # every length
    {"index_kpool": 4, "draft_tokens": 6, "index_topk": 512},
    {"index_kpool": 2, "draft_tokens": 7, "index_topk": 64},  # closes up to four k-pools
    {"index_kpool": 16, "draft_tokens": 3, "index_topk": 2048},
]


def kpool_plan() -> ModuleType:
    """SGLang's module of the write plan; skips the test where SGLang has none."""
    sglang = pytest.importorskip("sglang")
    try:
        return importlib.import_module("sglang.srt.layers.attention.dsa.kpool_plan")
    except ModuleNotFoundError:
        pytest.skip(f"SGLang {sglang.__version__} has no k-pooling; 0.5.20 and later have")


def numbers_server_pages() -> bool:
    """Whether an index page has the number of a server page of k times as many tokens: since 0.5.22."""
    update = kpool_plan().update_kpool_write_plan
    return "physical_page_size" in inspect.signature(update).parameters


def server_page_size(k: int) -> int:
    return PAGE * k if numbers_server_pages() else PAGE


@contextlib.contextmanager
def on_cuda_as_they_think() -> Iterator[None]:
    with mock.patch.object(kpool_plan(), "is_cuda", return_value=True):
        yield


def make(role: str, index_kpool: int, sizes: Sequence[int] = (BS,), **shape: int) -> GraphBackend:
    """SGLang's backend, with the metadata of these batch sizes; three pages of the index."""
    page_size = server_page_size(index_kpool)
    settings = {"context_len": 2 * PAGE * index_kpool, "max_bs": BS, "page_size": page_size, **shape}
    made = GraphBackend(CPU, role=role, index_kpool=index_kpool, **settings)
    made.model_runner.token_to_kv_pool.index_page_size = PAGE  # since 0.5.22
    with on_cuda_as_they_think():
        made.init_state()
        for bs in sizes:
            made.capture_setup(bs)
    return made


def lengths_of(index_kpool: int, draft_tokens: int, most: int) -> list[int]:
    """From 1 on: all where that is affordable, else those around multiples of k and of the pages."""
    if (index_kpool, draft_tokens) == (4, 4):
        return list(range(1, most + 1))
    steps = (*range(0, 4 * index_kpool, index_kpool), *range(0, most + PAGE, PAGE))
    near = {step + off for step in steps for off in range(-draft_tokens - 1, draft_tokens + 2)}
    return sorted(length for length in near if 1 <= length <= most)


def replay(
    harness: GraphBackend, lengths: list[int], generator: torch.Generator, bs: int = BS
) -> torch.Tensor:
    """SGLang's own fill for these lengths, padded to ``bs`` requests.

    Returns how many tokens of each request are accepted.
    """
    random_step(harness.inputs, generator, len(lengths), bs, harness.draft_tokens, harness.longest)
    harness.inputs.seq_lens[: len(lengths)].copy_(torch.tensor(lengths))
    accepted = torch.randint(0, harness.draft_tokens + 1, (bs,), generator=generator).int()
    view = harness.replay_view(bs)
    view.spec_info.num_accept_tokens = accepted
    with on_cuda_as_they_think(), harness.stub_process():
        harness.backend.init_forward_metadata_out_graph(view)
    return accepted


def sglang_tensors(metadata: object) -> dict[str, torch.Tensor]:
    """What SGLang has of a k-pooling fill, by our names."""
    plan = metadata.kpool_write_plan
    kpool_seqlens = plan.pool_seqlens_per_q
    found = {
        "nsa_cache_seqlens": metadata.dsa_cache_seqlens_int32,
        "nsa_cu_seqlens_k": metadata.dsa_cu_seqlens_k,
        "write_requests": plan.req,
        "write_start": plan.write_start,
        "tail_start": plan.tail_logical_start,
        "write_locs": plan.write_loc,
        "write_counts": plan.effective_n_per_batch,
        "row_seqlens": plan.seqlens_per_q,
        "kpool_seqlens": metadata.pooled_cache_seqlens_int32 if kpool_seqlens is None else kpool_seqlens,
        "kpool_page_table": metadata.pooled_real_page_table,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def fill(harness: GraphBackend, metadata: object, k: int, accepted: torch.Tensor) -> KPoolArgs:
    """Our fill of the same inputs, into tensors like SGLang's."""
    theirs, bs = sglang_tensors(metadata), len(accepted)
    n = 1 if harness.role == "draft-decode" else harness.draft_tokens
    args = KPoolArgs(
        seq_lens=harness.inputs.seq_lens[:bs],
        req_pool_indices=harness.inputs.req_pool_indices[:bs],
        req_to_token=harness.inputs.req_to_token,
        extend_lens=n,
        length_offset=n if harness.role == "verify" else 0,
        accept_lens=accepted if "write_counts" in theirs else None,
        index_kpool=k,
        index_topk=harness.index_topk,
        server_page_size=server_page_size(k),
        **{name: torch.full_like(tensor, POISON) for name, tensor in theirs.items()},
    )
    kpool_torch.fill(args)
    return args


def live_cells(args: KPoolArgs, name: str) -> torch.Tensor:
    """Which cells SGLang reads, or may."""
    out = args.outputs()[name]
    length = (args.seq_lens + args.length_offset)[:, None]
    if name == "kpool_page_table":
        column = torch.arange(out.shape[1])
        return (column * PAGE * args.index_kpool < length).repeat_interleave(args.extend_lens, dim=0)
    if name == "write_locs":
        kpool = args.write_start[:, None].clamp(min=0) // args.index_kpool + torch.arange(out.shape[1])
        return kpool // PAGE * PAGE * args.index_kpool < length
    return torch.ones_like(out, dtype=torch.bool)


def expect_equal(args: KPoolArgs, theirs: dict[str, torch.Tensor], compared: dict[str, int]) -> None:
    for name, ours in args.outputs().items():
        live = live_cells(args, name)
        different = live & (ours != theirs[name])
        cell = tuple(different.nonzero()[0].tolist()) if different.any() else None
        assert cell is None, (
            f"{name}{list(cell)}: SGLang has {int(theirs[name][cell])}, ours is {int(ours[cell])}, "
            f"lengths {args.seq_lens.tolist()}"
        )
        assert (ours[~live] == POISON).all(), f"{name}: a cell that is not live was written"
        compared[name] = compared.get(name, 0) + int(live.sum())


def tensors_of(role: str) -> set[str]:
    """Which tensors a role has."""
    names = {"nsa_cache_seqlens", "nsa_cu_seqlens_k", "kpool_seqlens"}
    names |= {"write_requests", "write_start", "tail_start", "write_locs"}
    if role != "draft-decode":
        names |= {"row_seqlens"}
    if role == "draft-extend":
        names |= {"write_counts"}
    if role == "draft-decode" or (role == "verify" and numbers_server_pages()):
        names |= {"kpool_page_table"}
    return names


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_value_equals_sglangs(role: str, shape: dict[str, int]) -> None:
    kpool_plan()
    k, n = shape["index_kpool"], shape["draft_tokens"]
    harness = make(role, **shape)
    generator = torch.Generator().manual_seed(1)
    lengths = lengths_of(k, n, harness.longest - (n if role == "verify" else 0))
    lengths += lengths[: -len(lengths) % BS]
    compared: dict[str, int] = {}
    for first in range(0, len(lengths), BS):
        accepted = replay(harness, lengths[first : first + BS], generator)
        for metadata in harness.metadata(BS):
            args = fill(harness, metadata, k, accepted)
            expect_equal(args, sglang_tensors(metadata), compared)
    assert compared.keys() == tensors_of(role)
    assert min(compared.values()) >= len(lengths)


def test_another_start_is_found() -> None:
    """That the comparison can fail."""
    kpool_plan()
    harness = make("verify", 4, draft_tokens=4, index_topk=128)
    accepted = replay(harness, list(range(60, 60 + BS)), torch.Generator().manual_seed(2))
    (metadata,) = harness.metadata(BS)
    args = fill(harness, metadata, 4, accepted)
    expect_equal(args, sglang_tensors(metadata), {})
    harness.inputs.seq_lens.add_(1)
    with pytest.raises(AssertionError, match="SGLang has"):
        expect_equal(fill(harness, metadata, 4, accepted), sglang_tensors(metadata), {})


# SGLang's fused kernels, which it uses on CUDA in place of the above for all but the write plan.


def fused(role: str) -> Callable[..., None]:
    kpool_plan()
    file, name = {
        "draft-decode": ("decode", "decode"),
        "verify": ("verify", "target_verify"),
        "draft-extend": ("draft_extend", "draft_extend"),
    }[role]
    for package in FUSED:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"{package}.{file}")
            launchers = [f"fused_dsa_{name}_metadata_kpool", f"fused_dsa_{name}_metadata"]
            return next(getattr(module, each) for each in launchers if hasattr(module, each))
    raise AssertionError(f"no module of {', '.join(FUSED)}")


def base_outputs(bs: int, n: int, width: int) -> dict[str, torch.Tensor]:
    rows = bs * n
    shapes = {
        "cache_seqlens": (bs,),
        "cu_seqlens_k": (bs + 1,),
        "seqlens_expanded": (rows,),
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
        "page_table_1": (rows, width),
        "real_page_table": (rows, -(-width // PAGE)),
    }
    return {name: torch.full(shape, POISON, dtype=torch.int32) for name, shape in shapes.items()}


def launch(role: str, args: FillArgs, k: int, out: dict[str, torch.Tensor]) -> None:
    """The fused kernel of a role into ``out``."""
    run, width = fused(role), args.page_table_1.shape[1]
    sizes: dict[str, object] = {
        "draft-decode": {"max_len": width},
        "verify": {"max_seqlen_k": width, "next_n": args.extend_lens},
        "draft-extend": {
            "extend_seq_lens": torch.full((args.bs,), args.extend_lens, dtype=torch.int32),
            "total_len": args.rows,
            "max_seqlen_k": width,
            "max_extend_len": args.extend_lens,
            "max_total_len": args.rows,
            "static_extend_len": True,
        },
    }[role]
    if role != "draft-decode":
        sizes["seqlens_expanded"] = out["seqlens_expanded"]
    is_renamed = "physical_page_size" in inspect.signature(run).parameters  # in 0.5.22
    sizes["physical_page_size" if is_renamed else "real_page_size"] = PAGE
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        run(
            seq_lens=args.seq_lens,
            req_pool_indices=args.req_pool_indices,
            req_to_token=args.req_to_token,
            cache_seqlens=out["cache_seqlens"],
            cu_seqlens_k=out["cu_seqlens_k"],
            page_table_1=out["page_table_1"],
            dsa_cache_seqlens=out["nsa_cache_seqlens"],
            dsa_cu_seqlens_k=out["nsa_cu_seqlens_k"],
            real_page_table=out["real_page_table"],
            bs=args.bs,
            dsa_index_topk=args.index_topk,
            index_kpool=k,
            **sizes,
        )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("k", "n", "topk"), [(4, 4, 128), (4, 6, 512), (2, 7, 64), (16, 3, 2048)])
def test_the_fused_kernels_write_the_same_lengths_and_tables(
    role: str, k: int, n: int, topk: int
) -> None:
    """The lengths that differ are the k-pooling fill's; all others are those of a fill without it."""
    width, generator = 2 * PAGE + 3, torch.Generator().manual_seed(3)
    slots = torch.randint(0, 2**31 - 1, (12, width), generator=generator, dtype=torch.int32)
    edges = (*range(0, 4 * k, k), PAGE, 2 * PAGE, topk, topk + k)
    lengths = sorted({edge + off for edge in edges for off in range(-2, n + 2)} - {-2, -1, 0})
    lengths += lengths[: -len(lengths) % BS]
    for first in range(0, len(lengths), BS):
        indices = torch.randint(0, 12, (BS,), generator=generator)
        compare_with_fused(role, lengths[first : first + BS], indices, slots, k=k, n=n, topk=topk)


def compare_with_fused(
    role: str,
    lengths: list[int],
    indices: torch.Tensor,
    slots: torch.Tensor,
    *,
    k: int,
    n: int,
    topk: int,
) -> int:
    """Compares what both of our fills write with what SGLang's kernel does; returns how many values."""
    rows_per_request, bs, compared = 1 if role == "draft-decode" else n, len(lengths), 0
    ours, theirs = (base_outputs(bs, rows_per_request, slots.shape[1]) for _ in range(2))
    args = FillArgs(
        seq_lens=torch.tensor(lengths),
        req_pool_indices=indices,
        req_to_token=slots,
        extend_lens=rows_per_request,
        length_offset=n if role == "verify" else 0,
        index_topk=topk,
        page_size=PAGE,
        **ours,
    )
    reference.fill(args)
    kpool_torch.fill(kpool_args_beside(args, k))
    launch(role, args, k, theirs)
    for name, tensor in ours.items():
        if (role, name) == ("draft-decode", "seqlens_expanded"):
            continue  # SGLang has none there
        live = tensor != POISON
        assert live.any()
        assert torch.equal(tensor[live], theirs[name][live]), f"{name}, {lengths}"
        compared += int(live.sum())
    return compared


def kpool_args_beside(args: FillArgs, k: int) -> KPoolArgs:
    """A k-pooling fill into the lengths of a fill, and into tensors of its own."""
    bs, rows, n = args.bs, args.rows, args.extend_lens
    return KPoolArgs(
        seq_lens=args.seq_lens,
        req_pool_indices=args.req_pool_indices,
        req_to_token=args.req_to_token,
        extend_lens=n,
        length_offset=args.length_offset,
        index_kpool=k,
        index_topk=args.index_topk,
        server_page_size=server_page_size(k),
        nsa_cache_seqlens=args.nsa_cache_seqlens,
        nsa_cu_seqlens_k=args.nsa_cu_seqlens_k,
        write_requests=torch.empty(bs, dtype=torch.int64),
        write_start=torch.empty(bs, dtype=torch.int32),
        tail_start=torch.empty(bs, dtype=torch.int32),
        write_locs=torch.empty(bs, -(-n // k), dtype=torch.int64),
        kpool_seqlens=torch.empty(rows, dtype=torch.int32),
    )


# Random batches. Batch number i is made from seed i, so that a run repeats the one before.

RANDOM_SHAPES = [
    *SHAPES,
    {"index_kpool": 8, "draft_tokens": 5, "index_topk": 512},
    {"index_kpool": 64, "draft_tokens": 3, "index_topk": 128},
]


def random_length(rng: Random, k: int, n: int, longest: int) -> int:
    """1 to ``longest``: around multiples of k and of the pages, more often than not."""
    step = rng.choice([1, k, PAGE, PAGE * k])
    length = rng.randrange(0, longest // step + 1) * step + rng.randint(-n - 1, n + 1)
    return min(max(length, 1), longest)


@pytest.fixture
def without_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter spends a third of its time on its checks of overflow, which change no value."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.mark.usefixtures("without_overflow_checks")
@pytest.mark.parametrize("role", ROLES)
def test_random_batches(
    role: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """The metadata of SGLang's backend, and for some batches what its fused kernel writes."""
    kpool_plan()
    batches = request.config.getoption("--fuzz-batches") or RANDOM_BATCHES
    compared: dict[str, int] = {}
    harnesses = [make(role, sizes=FEW, **shape) for shape in RANDOM_SHAPES]
    for number in range(batches):
        shape = number % len(RANDOM_SHAPES)
        compare_random_batch(harnesses[shape], RANDOM_SHAPES[shape], number, compared)
    assert compared.keys() == tensors_of(role) | {"requests", "fused_batches", "fused_values"}
    for name, count in {"role": role, "batches": batches, **compared}.items():
        record_property(name, count)


def compare_random_batch(
    harness: GraphBackend, shape: dict[str, int], seed: int, compared: dict[str, int]
) -> None:
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    k, n, bs = shape["index_kpool"], shape["draft_tokens"], rng.choice(FEW)
    longest = harness.longest - (n if harness.role == "verify" else 0)
    lengths = [random_length(rng, k, n, longest) for _ in range(rng.randint(1, bs))]
    accepted = replay(harness, lengths, generator, bs)
    for metadata in harness.metadata(bs):
        expect_equal(fill(harness, metadata, k, accepted), sglang_tensors(metadata), compared)
    count(compared, requests=bs)
    if rng.randrange(FUSED_EACH) == 0:
        inputs, columns = harness.inputs, rng.randint(1, PAGE + 1)
        values = compare_with_fused(
            harness.role,
            inputs.seq_lens[:bs].tolist(),
            inputs.req_pool_indices[:bs],
            inputs.req_to_token[:, :columns].contiguous(),
            k=k,
            n=n,
            topk=shape["index_topk"],
        )
        count(compared, fused_batches=1, fused_values=values)


def count(compared: dict[str, int], **more: int) -> None:
    for name, number in more.items():
        compared[name] = compared.get(name, 0) + number
