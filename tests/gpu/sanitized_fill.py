"""Fills of every kind by the CUDA kernel, and comparisons of them, for compute-sanitizer.

Each fill is compared with the reference on the CPU, too.

Not a test of pytest: ``compute-sanitizer --tool memcheck python tests/gpu/sanitized_fill.py``. Ends with
the number of fills; exit code 1 when a value differs or the comparison missed a difference. With
``--planted`` fills read what was never written and then what was given back: tools that find nothing
there watch other kernels. Each tensor has to be an allocation of its own for that
(``PYTORCH_NO_CUDA_MEMORY_CACHING=1``).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch

from sglang_nsa_plugin.self_test import small_case
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import compiled, cuda
from sglang_nsa_plugin.kernels import torch as reference
from sglang_nsa_plugin.shadow import Comparison, Field, Pair, Report

WIDTHS = (64, 193, 1_030, 2_049)
BATCHES = (0, 1, 3, 257)  # the last one needs two tiles of requests
DEVICE = torch.device("cuda", 0)


def case(bs: int, width: int, q: int, ragged: bool, wide: bool, generator: torch.Generator) -> FillArgs:
    """A random batch whose tables are ``width`` wide, with lengths from below 0 to over the width."""
    rows = bs * q + (5 if ragged else 0)
    pages = -(-width // 64)

    def numbers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype).to(DEVICE)

    def output(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32).to(DEVICE)

    return FillArgs(
        seq_lens=numbers(-3, width + 9, bs),
        req_pool_indices=numbers(-1, 6, bs, dtype=torch.int32),
        req_to_token=numbers(0, 1 << 30, 5, width + 3, dtype=torch.int32),
        extend_lens=numbers(0, 2 * q, bs, dtype=torch.int32) if ragged else q,
        index_topk=37,
        page_size=64,
        cache_seqlens=output(bs),
        cu_seqlens_k=output(bs + 1),
        seqlens_expanded=output(rows),
        nsa_cache_seqlens=output(rows),
        nsa_cu_seqlens_k=output(rows + 1),
        ctx_lens=output(rows, 1),
        page_table_1=output(rows, width) if wide else None,
        real_page_table=output(rows, pages),
        row_count=output(1),
    )


def check(args: FillArgs) -> bool:
    """Fills ``args`` and compares with the reference computed on the CPU."""
    host = {name: tensor.cpu() for name, tensor in (args.inputs() | args.outputs()).items()}
    expected = replace(args, **host)
    cuda.bind(args)()
    reference.fill(expected)
    equal = all(torch.equal(t.cpu(), expected.outputs()[n]) for n, t in args.outputs().items())
    return equal and finds_a_difference(args)


def finds_a_difference(args: FillArgs) -> bool:
    """Compares a filled table with itself and with one wrong cell, as the shadow check does."""
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
    """A fill of lengths that were never written, and one of tensors that are gone."""
    args = case(3, 193, 4, ragged=False, wide=True, generator=generator)
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
    cases = [small_case(DEVICE, ragged) for ragged in (False, True)]
    kinds = itertools.product(BATCHES, WIDTHS, (1, 4), (False, True), (False, True))
    cases += [case(*kind, generator=generator) for kind in kinds]
    wrong = sum(not check(args) for args in cases)
    print(f"sanitized fills: {len(cases)}, wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
