"""Runs every kind of fill and comparison of the CUDA kernels under compute-sanitizer.

``compute-sanitizer --tool memcheck python tests/gpu/sanitized_fill.py``; pytest does not collect it.
Every fill is also compared with the reference on the CPU. Prints the number of fills; the exit code is 1
when a value differs or a comparison misses a difference.

With ``--planted`` one fill reads memory that was never written and another reads freed memory. A tool
that reports neither does not watch these kernels. Each tensor must be an allocation of its own for that
(``PYTORCH_NO_CUDA_MEMORY_CACHING=1``).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import compiled, cuda
from sglang_nsa_plugin.kernels import torch as reference
from sglang_nsa_plugin.self_test import small_case
from sglang_nsa_plugin.shadow import Comparison, Field, Pair, Report

COLUMNS = (64, 193, 1_030, 2_049)
BATCHES = (0, 1, 3, 257)  # the last one is more requests than one block takes
DEVICE = torch.device("cuda", 0)


def case(
    bs: int, columns: int, q: int, ragged: bool, both_tables: bool, generator: torch.Generator
) -> FillArgs:
    """A random batch over tables of ``columns`` tokens, with lengths from below 0 to more than that.

    Uniform ones over both tables go by requests.
    """
    rows = bs * q + (5 if ragged else 0)
    pages = -(-columns // 64)

    def numbers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype).to(DEVICE)

    def output(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32).to(DEVICE)

    return FillArgs(
        seq_lens=numbers(-3, columns + 9, bs),
        req_pool_indices=numbers(-1, 6, bs, dtype=torch.int32),
        req_to_token=numbers(0, 1 << 30, 5, columns + 3, dtype=torch.int32),
        length_offset=q if both_tables else 0,
        extend_lens=numbers(0, 2 * q, bs, dtype=torch.int32) if ragged else q,
        index_topk=37,
        page_size=64,
        cache_seqlens=output(bs),
        cu_seqlens_k=output(bs + 1),
        seqlens_expanded=output(rows) if ragged or q > 1 else None,
        nsa_cache_seqlens=output(rows),
        nsa_cu_seqlens_k=output(rows + 1),
        ctx_lens=output(bs, q) if both_tables and not ragged else output(rows, 1),
        mqa_schedule=None if ragged else output(133, 2),
        page_table_1=output(rows, columns) if both_tables else None,
        real_page_table=output(rows, pages),
        row_count=output(1),
    )


def is_correct(args: FillArgs) -> bool:
    """Whether the fill equals the reference on the CPU, and the comparison finds a difference."""
    host = {name: tensor.cpu() for name, tensor in (args.inputs() | args.outputs()).items()}
    expected = replace(args, **host)
    cuda.bind(args)()
    reference.fill(expected)
    equal = all(torch.equal(t.cpu(), expected.outputs()[n]) for n, t in args.outputs().items())
    return equal and finds_a_difference(args)


def finds_a_difference(args: FillArgs) -> bool:
    """Whether the shadow check's comparison counts 0 in equal tables and 1 after one cell is changed."""
    report = Report(DEVICE)
    ours = args.real_page_table
    assert ours is not None
    theirs = ours.clone()
    comparison = Comparison([Pair("real_page_table", ours, theirs)], args.cache_seqlens, report)
    comparison.run()
    equal = report.on_device.tolist()[Field.DIFFERENT] == 0
    if theirs.numel() == 0:
        return equal
    theirs[-1, -1] += 1
    comparison.run()
    return equal and report.on_device.tolist()[Field.DIFFERENT] == 1


def plant(generator: torch.Generator) -> None:
    """A fill whose lengths were never written, and one whose tensors are freed."""
    args = case(3, 193, 4, ragged=False, both_tables=True, generator=generator)
    cuda.bind(replace(args, seq_lens=torch.empty_like(args.seq_lens)))()
    torch.cuda.synchronize()
    launch = compiled.binder()(args)  # which holds addresses only
    del args
    launch(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    if "--planted" in sys.argv[1:]:
        plant(generator)
        return 0
    kinds_of_small = ((False, False), (True, False), (False, True))
    cases = [small_case(DEVICE, ragged, by_request=way) for ragged, way in kinds_of_small]
    kinds = itertools.product(BATCHES, COLUMNS, (1, 4), (False, True), (False, True))
    cases += [case(*kind, generator=generator) for kind in kinds]
    wrong = sum(not is_correct(args) for args in cases)
    print(f"sanitized fills: {len(cases)}, wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
