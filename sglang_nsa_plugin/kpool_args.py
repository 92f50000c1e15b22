"""The contract of a k-pooling fill: what it writes for models that pool the keys of their index."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_nsa_plugin.fill_args import (
    INDEX_DTYPES,
    INT32_MAX,
    number,
    present,
    validate_bool,
    validate_device,
    validate_overlap,
    validate_schedule_shape,
    validate_shape,
    validate_tensor,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class KPoolArgs:
    """The tensors of one k-pooling fill, validated when the object is made.

    Such a model has one index key for k tokens, a *k-pool*: k-pool i of a request stands for its tokens
    from ``i * k`` up to ``(i + 1) * k``, and is closed when the request has all of them. The fill comes
    after that of ``FillArgs`` for the same batch, and has its names: request r has
    ``L = seq_lens[r] + length_offset`` tokens, the low 32 bits of the sum, of which the last
    ``n = extend_lens`` are the rows ``t = r * n + j, 0 <= j < n``. ``E = max(L - n + 1 + j, 0)`` is what
    a row sees. Divisions round toward 0. A fill writes:

    ================= ======= ================ ======================================================
    nsa_cache_seqlens int32   [rows]           min(E - E mod k, index_topk) + E mod k
    nsa_cu_seqlens_k  int32   [rows + 1]       0, then running sums of nsa_cache_seqlens
    write_requests    int64   [bs]             req_pool_indices[r]
    write_start       int32   [bs]             S = L - n, the first token that is written
    tail_start        int32   [bs]             S / k * k, the first token of its k-pool
    write_locs        int64   [bs, ceil(n/k)]  where the key of k-pool i = S / k + p goes:
                                               page(r, i / page_size) * page_size + i mod page_size
    write_counts      int32   [bs]             accept_lens[r]
    row_seqlens       int32   [rows]           S + 1 + j: E, but not bounded by 0
    kpool_seqlens     int32   [rows]           row_seqlens / k: the closed k-pools that a row sees
    kpool_page_table  int32   [rows, columns]  page(r, c) for c * page_size * k < L
    kpool_schedule    int32   [P + 1, 2]       ``mqa_schedule`` of rows of max(kpool_seqlens, 1)
    ================= ======= ================ ======================================================

    ``page(r, c) = req_to_token[req_pool_indices[r], c * page_size * k] / server_page_size``, rounded
    down: the page that holds the keys of the k-pools from ``c * page_size`` on.

    Inputs, int32 or int64, any strides:
        seq_lens: [bs], of which the low 32 bits count.
        length_offset: tokens that ``seq_lens`` does not count yet, 0 or more.
        extend_lens: n, the rows of each request, 1 or more.
        req_pool_indices: [bs], rows of ``req_to_token``.
        req_to_token: [pool, tokens], the KV slot of each token of each request, low 32 bits.
        accept_lens: [bs], how many of the n tokens are accepted; None unless ``write_counts`` is given.
        index_kpool: k, 2 or more.
        index_topk: how many tokens of closed k-pools sparse attention keeps, a multiple of k.
        page_size: k-pools in a page of the index, a multiple of k. SGLang has 64.
        server_page_size: tokens in a page of the server, by which it numbers the pages of the index:
            ``page_size`` up to 0.5.21, ``page_size * k`` since 0.5.22.
        enabled: None, or int32 [1]. A fill that reads 0 there writes nothing.

    ``write_counts``, ``row_seqlens``, ``kpool_page_table`` and ``kpool_schedule`` are not filled when
    None. SGLang's fields, of ``DSAMetadata`` and, with a dot, of its ``kpool_write_plan``:

    ================= ================================== =======================================
    our name          draft-decode                       verify and draft-extend
    ================= ================================== =======================================
    nsa_…             dsa_cache_seqlens_int32, dsa_cu_…  the same
    write_requests    .req                               .req
    write_start       .write_start                       .write_start
    tail_start        .tail_logical_start                .tail_logical_start
    write_locs        .write_loc                         .write_loc
    write_counts      none                               .effective_n_per_batch, of draft-extend
    row_seqlens       none                               .seqlens_per_q
    kpool_seqlens     pooled_cache_seqlens_int32         .pool_seqlens_per_q
    kpool_page_table  pooled_real_page_table             the same, of verify since 0.5.22
    kpool_schedule    pooled_paged_mqa_schedule_metadata .pool_schedule_metadata
    ================= ================================== =======================================

    SGLang's ``pooled_topk_v2_plan`` and ``.pool_topk_v2_plan`` (since 0.5.23) follow from
    ``kpool_seqlens`` by a function of SGLang's, as ``topk_v2_plan`` does. This is what its
    ``_update_kpool_metadata_replay`` and its fused kernels of 0.5.20 to 0.5.23 write.

    Edges: cells of ``kpool_page_table`` that the table leaves out keep what they held, as do those after
    the columns of ``req_to_token``. So do cells of ``write_locs`` whose page begins at or after L or
    those columns; with 0 <= S and enough columns there are none. A page before 0, of a start before 0,
    counts as page 0. A request whose index lies outside the pool has slot 0. SGLang rounds
    ``kpool_seqlens`` of draft-decode down; that differs for negative lengths alone, which no batch has.

    Raises:
        TypeError: a value is not a tensor or not a number, its dtype is wrong, or it is a fake tensor.
        ValueError: a device, rank, shape, stride or value is wrong, or outputs overlap.
    """

    seq_lens: torch.Tensor
    req_pool_indices: torch.Tensor
    req_to_token: torch.Tensor
    extend_lens: int
    length_offset: int = 0
    accept_lens: torch.Tensor | None = None
    index_kpool: int
    index_topk: int
    page_size: int = 64
    server_page_size: int
    nsa_cache_seqlens: torch.Tensor
    nsa_cu_seqlens_k: torch.Tensor
    write_requests: torch.Tensor
    write_start: torch.Tensor
    tail_start: torch.Tensor
    write_locs: torch.Tensor
    write_counts: torch.Tensor | None = None
    row_seqlens: torch.Tensor | None = None
    kpool_seqlens: torch.Tensor
    kpool_page_table: torch.Tensor | None = None
    kpool_schedule: torch.Tensor | None = None
    mqa_remainder_last: bool = False
    enabled: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _take_numbers(self)
        _validate_tensors(self)
        _validate_shapes(self)
        validate_overlap(self)

    @property
    def device(self) -> torch.device:
        """The device of every tensor."""
        return self.seq_lens.device

    @property
    def bs(self) -> int:
        """Number of requests."""
        return self.seq_lens.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows of the outputs."""
        return self.bs * self.extend_lens

    def inputs(self) -> dict[str, torch.Tensor]:
        """The input tensors that are not None, by name."""
        return present(self, INPUTS)

    def outputs(self) -> dict[str, torch.Tensor]:
        """The output tensors that are not None, by name."""
        return present(self, OUTPUTS)


INPUTS = ("seq_lens", "req_pool_indices", "req_to_token", "accept_lens", "enabled")
OUTPUTS = (
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "write_requests",
    "write_start",
    "tail_start",
    "write_locs",
    "write_counts",
    "row_seqlens",
    "kpool_seqlens",
    "kpool_page_table",
    "kpool_schedule",
)
OPTIONAL = (
    "accept_lens",
    "enabled",
    "write_counts",
    "row_seqlens",
    "kpool_page_table",
    "kpool_schedule",
)
MATRICES = ("req_to_token", "write_locs", "kpool_page_table", "kpool_schedule")
INT64_OUTPUTS = ("write_requests", "write_locs")


def _take_numbers(args: KPoolArgs) -> None:
    """Validates the numbers and makes each a plain int: the compiled library takes nothing else."""
    lowest = {
        "extend_lens": 1,
        "length_offset": 0,
        "index_kpool": 2,
        "index_topk": 1,
        "page_size": 1,
        "server_page_size": 1,
    }
    numbers = {name: number(name, getattr(args, name), least) for name, least in lowest.items()}
    vars(args).update(numbers)  # the dataclass is frozen
    k, page_size = args.index_kpool, args.page_size
    for name in ("index_topk", "page_size"):
        if numbers[name] % k:
            raise ValueError(f"{name}: must be a multiple of index_kpool={k}, got {numbers[name]}")
    if page_size * k > INT32_MAX:
        raise ValueError(f"page_size: times index_kpool={k} must lie below 2**31, got {page_size}")
    if args.server_page_size not in (page_size, page_size * k):
        raise ValueError(
            f"server_page_size: must be {page_size} or {page_size * k} for page_size={page_size}, "
            f"index_kpool={k}, got {args.server_page_size}"
        )
    validate_bool("mqa_remainder_last", args.mqa_remainder_last)


def _validate_tensors(args: KPoolArgs) -> None:
    validate_device(args.seq_lens)
    for name in (*INPUTS, *OUTPUTS):
        value = getattr(args, name)
        if value is None and name in OPTIONAL:
            continue
        ranks = (2,) if name in MATRICES else (1,)
        validate_tensor(name, value, args.seq_lens, _dtypes(name), ranks)
    if (args.accept_lens is None) != (args.write_counts is None):
        missing, given = ("accept_lens", "write_counts")[:: 1 if args.accept_lens is None else -1]
        raise TypeError(f"{missing}: must be a torch.Tensor when {given} is given, got NoneType")


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    if name in INT64_OUTPUTS:
        return (torch.int64,)
    return INDEX_DTYPES if name in INPUTS and name != "enabled" else (torch.int32,)


def _validate_shapes(args: KPoolArgs) -> None:
    bs, rows = args.bs, args.rows
    shapes: dict[str, tuple[int, ...]] = {
        "req_pool_indices": (bs,),
        "accept_lens": (bs,),
        "enabled": (1,),
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
        "write_requests": (bs,),
        "write_start": (bs,),
        "tail_start": (bs,),
        "write_locs": (bs, -(-args.extend_lens // args.index_kpool)),
        "write_counts": (bs,),
        "row_seqlens": (rows,),
        "kpool_seqlens": (rows,),
    }
    for name, shape in shapes.items():
        sizes = f"bs={bs}, extend_lens={args.extend_lens}, index_kpool={args.index_kpool}"
        validate_shape(name, getattr(args, name), shape, sizes)
    table, schedule = args.kpool_page_table, args.kpool_schedule
    if table is not None and table.shape[0] != rows:
        raise ValueError(f"kpool_page_table: must have {rows} rows, got shape {tuple(table.shape)}")
    if schedule is not None:
        validate_schedule_shape("kpool_schedule", schedule)
