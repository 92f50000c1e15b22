"""The ways to fill one case that ``bench`` times. Each must write the same values first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sglang_nsa_plugin import api, dispatch, self_test
from sglang_nsa_plugin.adapters import fields
from sglang_nsa_plugin.cli.bench import baseline_059
from sglang_nsa_plugin.cli.bench.cases import BOTH, PAGE, PAGED, DirectFills, Setup
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.harness.diff import Diff
from sglang_nsa_plugin.harness.graph_pair import GraphPair
from sglang_nsa_plugin.harness.installed import pair_for_installed
from sglang_nsa_plugin.state import DRAFT_EXTEND

Call = Callable[[], object]
# sglang: SGLang's own call before a replay. ours: the plugin's; its host time is that of the same call,
# its GPU time that of what the graph holds. sglang_kernel: only SGLang's fill kernel. cuda, cpu, triton,
# torch: that implementation, called directly. original: the fill of SGLang 0.5.7 to 0.5.9.
SGLANG, OURS, SGLANG_KERNEL, ORIGINAL = "sglang", "ours", "sglang_kernel", "original"


class DifferentValuesError(RuntimeError):
    """A path wrote other values than the path that it is compared with."""


@dataclasses.dataclass(frozen=True)
class Paths:
    """The calls that are timed on the host, and those that are captured and timed on the GPU."""

    host: dict[str, Call]
    gpu: dict[str, Call]


def pair_of(device: torch.device, setup: Setup, role: str = DRAFT_EXTEND) -> Any:
    """SGLang's backend of this role with the plugin beside one without it, in the sizes of a set-up."""
    return pair_for_installed(
        device,
        setup.requests,
        role=role,
        draft_tokens=setup.draft_tokens,
        context_len=setup.width - PAGE,
        pool_size=max(setup.requests) + 1,
        decode_impl=setup.decode_impl,
    )


def step(pair: Any, bs: int) -> int:
    """Runs and compares one step of both; returns how many values were compared.

    Raises:
        DifferentValuesError: the plugin wrote a value that differs from SGLang's.
    """
    diff = Diff()
    pair.step(bs, diff)
    if diff.first is not None:
        raise DifferentValuesError(f"not timed, because values differ: {diff.first}")
    return sum(diff.compared.values())


def implementations(device: torch.device) -> dict[str, str | None]:
    """The implementations for this device, best first, each with why it cannot run or None."""
    return {name: dispatch.why_unavailable(name, device) for name in dispatch.CANDIDATES[device.type]}


def direct(fills: DirectFills, bs: int, tables: str) -> dict[str, Call]:
    """Each implementation bound to the same tensors, and with both tables the original fill."""
    args = fills.args(bs, tables)
    calls: dict[str, Call] = {
        name: api.bind(args, name)
        for name, why_not in implementations(args.device).items()
        if why_not is None
    }
    return {**calls, ORIGINAL: baseline_059.bind(args)} if tables == BOTH else calls


def with_sglang(pair: GraphPair, fills: DirectFills, bs: int, tables: str) -> Paths:
    """All paths. SGLang's whole fill and the plugin's are in the case with the graph's tables."""
    ours = direct(fills, bs, tables)
    kernel = {SGLANG_KERNEL: pair.sglang_kernel(bs, with_page_table_1=tables == BOTH)}
    host, gpu = {**kernel, **ours}, {**kernel, **_capturable(ours)}
    if tables == recorded_tables(pair, bs):
        host = {SGLANG: pair.sglang_before_replay(bs), OURS: pair.before_replay(bs), **host}
        gpu = {SGLANG: pair.sglang_before_replay(bs), OURS: pair.recording(bs), **gpu}
    return Paths(host, gpu)


def recorded_tables(pair: GraphPair, bs: int) -> str:
    """Which page tables the graph of this batch size fills."""
    return BOTH if pair.metadata(bs).page_table_1 is not None else PAGED


def _capturable(calls: Mapping[str, Call]) -> dict[str, Call]:
    """All but the original, which waits for the device."""
    return {name: call for name, call in calls.items() if name != ORIGINAL}


def compare(calls: Mapping[str, Call], args: FillArgs, expected: Mapping[str, torch.Tensor]) -> int:
    """Runs each call over poisoned outputs and returns how many values were compared.

    Raises:
        DifferentValuesError: a call wrote a value that differs from ``expected``.
    """
    diff = Diff()
    lengths = args.seq_lens.repeat_interleave(args.rows // args.bs)
    for path, call in calls.items():
        for output in args.outputs().values():
            output.fill_(self_test.POISON)
        call()
        for name, output in args.outputs().items():
            if name in fields.TABLES:
                tokens = fields.tokens_per_column(name, args.page_size)
                diff.add_table(name, output, expected[name], lengths, tokens)
            else:
                diff.add(name, output, expected[name])
        if diff.first is not None:
            raise DifferentValuesError(f"not timed, because {path} filled other values: {diff.first}")
    return sum(diff.compared.values())


def sglang_values(pair: GraphPair, bs: int) -> dict[str, torch.Tensor]:
    """SGLang's tensors of this batch size, by their names in FillArgs."""
    metadata = pair.theirs.backend.decode_cuda_graph_metadata[bs]
    return fields.read(metadata, fields.DSA, (*fields.LENGTHS, "ctx_lens", *fields.TABLES))


def memory_bytes(*metadata: Any) -> int:
    """Bytes of the tensors of metadata objects; tensors at the same address count once."""
    tensors = {tensor.data_ptr(): tensor for each in metadata for tensor in _tensors(each)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(metadata: Any) -> Iterator[torch.Tensor]:
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from _tensors(value)
