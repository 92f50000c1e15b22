"""The eager adapter on SGLang's real backend object, on CPU tensors.

SGLang's own code plans the same batches on a second backend, and every field is compared.
"""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import isolated
import pytest
import torch
from failing_calls import Original, errors_of, every_call, failing_call, fresh, sglangs
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sglang")

from sglang_nsa_plugin.adapters import eager, eager_names, fields, in_graph
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.outcome import OUTCOME
from sglang_nsa_plugin.shadow import Difference

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="on a GPU, tests/gpu/test_gpu_eager.py covers the adapter"
    ),
    pytest.mark.skipif(
        in_graph.is_generation(), reason="this SGLang captures draft-extend in graphs: not eager"
    ),
]
NAMES = eager_names.names_of_generation()
replays_ragged = pytest.mark.skipif(
    NAMES is eager_names.DSA, reason="this SGLang has no ragged replay any more: 0.5.12 was the last"
)

CPU = torch.device("cpu")
MAX_BS = 8
DRAFT_TOKENS = 4
VIEWS = {"aten::as_strided", "aten::slice.Tensor"}


@pytest.fixture
def pair():
    return make_pair()


def make_pair(backend: str = "auto", **harness: object):
    from sglang_nsa_plugin.harness.eager_pair import EagerPair

    settings = {"draft_tokens": DRAFT_TOKENS, "context_len": 512, "pool_size": 12, **harness}
    return EagerPair(CPU, (1, 2, 4, MAX_BS), backend, **settings)


def random_batch(pair, generator, raw_bs=None, bs=None):
    from sglang_nsa_plugin.harness.inputs import random_step

    raw_bs = raw_bs or int(torch.randint(1, MAX_BS + 1, (), generator=generator))
    bs = bs or raw_bs
    longest = pair.ours.backend.max_context_len  # no further reaches SGLang's ragged page table
    random_step(pair.inputs, generator, raw_bs, bs, pair.ours.draft_tokens, longest)
    return bs


def step_and_expect_equal(pair, bs, global_num_tokens=None):
    """Lengths below the number of draft tokens are raised to it, as a server has them."""
    from sglang_nsa_plugin.harness.diff import Diff

    result = Diff()
    pair.step(bs, result, global_num_tokens)
    assert result.first is None, result.first
    return pair.ours.backend.forward_metadata


def lengths_of(metadata):
    """seqlens_expanded, cache_seqlens and their running sums, as lists."""
    names = ("seqlens_expanded", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
    return [tensor.tolist() for tensor in fields.read(metadata, NAMES.outputs, names).values()]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "harness",
    [
        {},
        {"page_size": 1},
        {"draft_tokens": 1},
        {"draft_tokens": 6, "index_topk": 100},
        {"page_size": 16, "context_len": 1_001},
    ],
    ids=str,
)
def test_every_field_equals_sglangs(backend, harness, state):
    pair = make_pair(backend, **harness)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert state.adapter == "eager"
    assert state.backend == {"auto": "cpu", "torch": "torch"}[backend]
    assert state.launches == 20
    assert not state.fallbacks


@pytest.mark.parametrize("draft_tokens", range(1, 7))
def test_requests_shorter_than_their_rows(draft_tokens):
    """F1: rows before the first token get length 0, not a negative one."""
    from sglang_nsa_plugin.harness.diff import Diff

    pair = make_pair(draft_tokens=draft_tokens, index_topk=5)
    pair.inputs.seq_lens.copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, 100]))
    result = Diff()
    pair.plan_both(pair.ours.batch(8), result)
    assert result.first is None, result.first
    expanded, clamped, sums = lengths_of(pair.ours.backend.forward_metadata)
    assert min(expanded) == 0
    assert expanded[:draft_tokens] == [0] * draft_tokens
    assert max(clamped) == 5
    assert sums == [0, *torch.tensor(clamped).cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("global_num_tokens", "rows"),
    [([8, 16], 16), ([8, 8], 8), ([8, 100], 100), ([8, 0], 8)],
    ids=["the other rank has more", "as many", "many more", "the other rank is idle"],
)
def test_rows_of_dp_padding_get_length_zero(pair, global_num_tokens, rows):
    """Only the clamped lengths are padded; tables and expanded lengths keep the rows of the batch."""
    generator = torch.Generator().manual_seed(2)
    for own_rows in (None, global_num_tokens):  # padding writes over what the step before left
        random_batch(pair, generator, raw_bs=2)
        metadata = step_and_expect_equal(pair, 2, own_rows)
    expanded, clamped, sums = lengths_of(metadata)
    assert len(expanded) == metadata.page_table_1.shape[0] == 8
    assert len(clamped) == rows
    assert clamped[8:] == [0] * (rows - 8)
    assert sums[8:] == [sums[8]] * (rows + 1 - 8)


def test_tensors_stay_and_each_step_has_an_object_of_its_own(pair):
    """SGLang's object is frozen, and the step before may still be read where it is kept."""
    generator = torch.Generator().manual_seed(3)
    random_batch(pair, generator, raw_bs=8)
    step_and_expect_equal(pair, 8)  # the largest: no table grows from here on
    seen = []
    for bs in (4, 2, 4, 2):
        random_batch(pair, generator, raw_bs=bs)
        seen.append(step_and_expect_equal(pair, bs))
    assert len({id(metadata) for metadata in seen}) == 4
    for first, second in ((seen[0], seen[2]), (seen[1], seen[3])):
        for name in fields.LENGTHS:
            tensors = [getattr(each, NAMES.outputs[name]) for each in (first, second)]
            assert tensors[0].data_ptr() == tensors[1].data_ptr()
    assert len({metadata.page_table_1.data_ptr() for metadata in seen}) == 1
    assert len({metadata.real_page_table.data_ptr() for metadata in seen}) == 1


def test_page_tables_grow_with_the_largest_batch_and_not_with_each_step(pair):
    memory = set()
    for longest in range(100, 300):
        pair.inputs.seq_lens.fill_(longest)
        pair.ours.plan(pair.ours.batch(4))
        memory.add(pair.ours.backend.forward_metadata.page_table_1.untyped_storage().data_ptr())
    assert len(memory) < 12
    cells = pair.ours.backend.forward_metadata.page_table_1.untyped_storage().nbytes() // 4
    assert cells <= 4 * DRAFT_TOKENS * 300 * 9 // 8


def test_cells_that_no_step_wrote_hold_the_padding_slot(pair):
    """Kernels that look ahead of a length find slots that exist."""
    pair.inputs.seq_lens[:2].copy_(torch.tensor([5, 300]))
    pair.inputs.req_pool_indices[:2].copy_(torch.tensor([1, 2]))
    pair.inputs.req_to_token[1:3].fill_(7 * 64)
    metadata = step_and_expect_equal(pair, 2)
    assert metadata.page_table_1[:DRAFT_TOKENS, 5:].unique().tolist() == [0]
    assert metadata.real_page_table[:DRAFT_TOKENS, 1:].unique().tolist() == [0]
    assert metadata.real_page_table[DRAFT_TOKENS:].unique().tolist() == [7]


class Operations(TorchDispatchMode):
    """The torch operations of a call, by name, and the tensors that a maximum was asked of."""

    def __init__(self):
        super().__init__()
        self.names, self.maxima = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.name() == "aten::max":
            self.maxima.append(args[0])
        return func(*args, **(kwargs or {}))


def test_a_step_is_one_launch_and_asks_the_device_for_nothing(pair):
    """Beside the launch there are views, and the maximum of the lengths on the host."""
    random_batch(pair, torch.Generator().manual_seed(4), raw_bs=4)
    pair.ours.plan(pair.ours.batch(4))  # allocates
    batch = pair.ours.batch(4)
    with pair.stub_process(), Operations() as ours:
        pair.ours.backend.init_forward_metadata(batch)
    with pair.stub_process(), Operations() as theirs:
        pair.theirs.backend.init_forward_metadata(batch)
    rest = [name for name in ours.names if name not in VIEWS]
    assert rest == ["aten::max", "aten::_local_scalar_dense"]
    assert ours.maxima[0] is batch.seq_lens_cpu
    assert len(theirs.names) > 15


def test_inference_mode_as_in_a_server(pair):
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        for bs in (2, 8, 2):
            random_batch(pair, generator, raw_bs=bs)
            step_and_expect_equal(pair, bs)


def fallback_batch(pair, reason):
    batch = pair.ours.batch(4)
    if reason is FallbackReason.OTHER_ROWS_PER_REQUEST:
        # as in the metadata of a backend that was made for another number of draft tokens
        pair.ours.backend.speculative_num_draft_tokens = DRAFT_TOKENS + 1
    elif reason is FallbackReason.OTHER_SIZES:
        batch.extend_seq_lens = batch.extend_seq_lens[:3]
    elif reason is FallbackReason.NO_HOST_LENGTHS:
        batch.seq_lens_cpu = None
    else:
        batch.batch_size = 0
    return batch


@pytest.mark.parametrize(
    "reason",
    [
        FallbackReason.NO_REQUESTS,
        FallbackReason.NO_HOST_LENGTHS,
        FallbackReason.OTHER_SIZES,
        FallbackReason.OTHER_ROWS_PER_REQUEST,
    ],
    ids=lambda reason: reason.name,
)
def test_other_batches_go_to_sglang_and_are_counted(pair, state, caplog, monkeypatch, reason):
    planned = []
    monkeypatch.setattr(
        type(pair.ours.backend), "set_" + NAMES.prefix + "_prefill_impl", lambda *_: planned.append(1)
    )
    random_batch(pair, torch.Generator().manual_seed(6), raw_bs=4)
    for count in (1, 2):
        batch = fallback_batch(pair, reason)
        try:
            pair.ours.plan(batch)
        except AssertionError:  # SGLang's own answer to a batch without lengths on the host
            assert reason is FallbackReason.NO_HOST_LENGTHS
        assert state.fallbacks == {reason.value: count}
    assert len(planned) == (0 if reason is FallbackReason.NO_HOST_LENGTHS else 2)  # by SGLang
    assert state.launches == 0
    said = [r for r in caplog.records if reason.value in r.getMessage()]
    assert len(said) == 1
    assert said[0].levelname == "WARNING"


def test_other_modes_go_to_sglang(pair, state):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_nsa_plugin.harness.diff import Diff

    random_batch(pair, torch.Generator().manual_seed(7), raw_bs=4)
    batch = pair.ours.batch(4)
    batch.forward_mode = ForwardMode.DECODE
    result = Diff()
    pair.plan_both(batch, result)
    assert result.first is None, result.first
    assert state.launches == 0
    assert not state.fallbacks


def test_a_prefill_in_between_does_not_leave_its_choice(pair):
    """A short prompt is prefilled by dense attention; the next draft-extend step is not."""
    random_batch(pair, torch.Generator().manual_seed(8), raw_bs=4)
    for one in (pair.ours, pair.theirs):
        one.backend.use_mha = True
    step_and_expect_equal(pair, 4)
    assert pair.ours.backend.use_mha is pair.theirs.backend.use_mha is False


@pytest.mark.parametrize(
    "runner_or_steps", [{"is_draft_worker": False}, {"speculative_num_steps": 3}], ids=str
)
def test_backends_that_plan_no_draft_extend_are_left_alone(pair, runner_or_steps):
    """The target's, and those of single draft steps."""
    from sglang_nsa_plugin.adapters import eager

    arguments = dict(runner_or_steps)
    runner = SimpleNamespace(**vars(pair.ours.model_runner))
    runner.is_draft_worker = arguments.pop("is_draft_worker", True)
    with pair.stub_process():
        backend = type(pair.ours.backend)(runner, **arguments)
    assert not hasattr(backend, eager.ATTRIBUTE)
    assert hasattr(pair.ours.backend, eager.ATTRIBUTE)


UNCOVERED = [
    ({"enable_multi_layer_eagle": True}, "the multi-layer EAGLE runner is not supported"),
    ({"enable_hisparse": True}, "HiSparse is not supported"),
    ({}, "planning on a separate stream (SGLANG_ENABLE_OVERLAP_PLAN_STREAM) is not supported"),
]


@pytest.mark.parametrize(("server_args", "reason"), UNCOVERED)
def test_what_is_not_covered_is_declined_at_start_up(state, caplog, monkeypatch, server_args, reason):
    from sglang_nsa_plugin import plugin
    from sglang_nsa_plugin.adapters import eager
    from sglang_nsa_plugin.dispatch import BackendUnavailableError
    from sglang_nsa_plugin.harness.eager_backend import EagerBackend

    caplog.set_level("INFO")
    if not server_args:
        monkeypatch.setenv("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "1")
    arguments = SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="nsa")
    plugin.activate(arguments)
    backends = [EagerBackend(CPU, **server_args) for _ in range(2)]  # a draft worker makes two
    assert not any(hasattr(one.backend, eager.ATTRIBUTE) for one in backends)
    assert (state.adapter, state.reason) == (None, reason)
    said = [r.getMessage() for r in caplog.records if reason in r.getMessage()]
    assert len(said) == 1

    arguments._nsa_metadata_backend = "torch"
    plugin.activate(arguments)
    why = f"torch was asked for by name .* {re.escape(reason)}"
    with pytest.raises(BackendUnavailableError, match=why):
        EagerBackend(CPU, **server_args)


def test_an_error_while_a_fill_is_set_up_leaves_every_backend_to_sglang(state, caplog, monkeypatch):
    from sglang_nsa_plugin import plugin
    from sglang_nsa_plugin.adapters import eager
    from sglang_nsa_plugin.dispatch import BackendUnavailableError
    from sglang_nsa_plugin.harness.eager_backend import EagerBackend

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    caplog.set_level("INFO")
    monkeypatch.setattr(eager.dispatch, "choose", no_memory)
    arguments = SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="nsa")
    plugin.activate(arguments)
    backends = [EagerBackend(CPU) for _ in range(2)]
    assert not any(hasattr(one.backend, eager.ATTRIBUTE) for one in backends)
    reason = "the fill could not be set up: OutOfMemoryError: CUDA out of memory"
    assert (state.adapter, state.backend, state.reason) == (None, None, reason)
    assert len([r for r in caplog.records if reason in r.getMessage()]) == 1

    arguments._nsa_metadata_backend = "torch"
    plugin.activate(arguments)
    why = f"torch was asked for by name .* {re.escape(reason)}"
    with pytest.raises(BackendUnavailableError, match=why):
        EagerBackend(CPU)


def test_a_backend_without_an_attribute_is_declined(pair):
    from sglang_nsa_plugin.adapters import eager

    del pair.theirs.backend.real_page_size
    why_not = eager.why_unsupported(pair.theirs.backend, pair.theirs.model_runner, NAMES)
    assert why_not == f"{type(pair.theirs.backend).__name__} has no attribute real_page_size"


def test_the_take_over_is_logged_once(state, caplog):
    caplog.set_level("INFO")
    make_pair()
    said = [r.getMessage() for r in caplog.records if "adapter eager" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("sglang-nsa-plugin ")
    assert said[0].endswith("adapter eager, implementation cpu: first choice, cpu self-test passed")


def test_one_backend_that_fails_hands_back_the_others(state, monkeypatch):
    """The record speaks for all of them."""
    from sglang_nsa_plugin.adapters import eager
    from sglang_nsa_plugin.harness.eager_backend import EagerBackend

    pair = make_pair()
    assert hasattr(pair.ours.backend, eager.ATTRIBUTE)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(eager, "EagerFill", no_memory)
    EagerBackend(CPU)
    assert (state.adapter, state.backend) == (None, None)
    pair.ours.plan(pair.ours.batch(random_batch(pair, torch.Generator().manual_seed(19))))
    assert not hasattr(pair.ours.backend, eager.ATTRIBUTE)
    assert not hasattr(pair.ours.backend, eager.RAGGED_ATTRIBUTE)
    assert state.launches == 0


@pytest.mark.parametrize("check_every", [0, 1])
def test_sglang_plans_a_step_whose_fill_failed_and_all_after_it(check_every, state, caplog):
    def run(number: int) -> list[str]:
        caplog.clear()
        fresh()
        pair = make_pair(check_every=check_every)
        backend = pair.ours.backend
        original = sglangs(type(backend).init_forward_metadata)
        generator = torch.Generator().manual_seed(number)
        batch = long_enough_batch(pair, generator)
        with pair.stub_process(), failing_call(number) as failed:
            eager._init_forward_metadata(original, backend, batch)
        expect_planned_as_sglang_does(pair, batch)
        if failed:
            assert len(errors_of(caplog)) == 1, failed
            assert hasattr(backend, eager.ATTRIBUTE) != OUTCOME.has_failed, failed
        if failed and OUTCOME.has_failed:
            assert original.calls == 1, failed
            launches = state.launches
            for _ in range(2):
                batch = long_enough_batch(pair, generator)
                pair.ours.plan(batch)
                expect_planned_as_sglang_does(pair, batch)
            assert state.launches == launches
        return failed

    names = every_call(run)
    assert {"EagerFill._why_fallback", "PageTable.view", "run"} <= set(names)


def long_enough_batch(pair, generator, raw_bs=None):
    """As a server has it: each length includes the draft tokens."""
    bs = random_batch(pair, generator, raw_bs)
    pair.inputs.seq_lens.clamp_(min=DRAFT_TOKENS)
    return pair.ours.batch(bs)


def expect_planned_as_sglang_does(pair, batch):
    from sglang_nsa_plugin.harness.diff import Diff, compare_planned

    result = Diff()
    pair.theirs.sglang_plan(batch)
    ours, theirs = pair.ours.backend.forward_metadata, pair.theirs.backend.forward_metadata
    compare_planned(ours, theirs, NAMES, result)
    assert result.first is None, result.first


def test_an_error_of_sglangs_own_plan_passes_as_it_is(pair, state):
    batch = pair.ours.batch(random_batch(pair, torch.Generator().manual_seed(18)))
    batch.seq_lens_cpu = None  # not served

    def failing(*_):
        raise KeyError("SGLang's own")

    original = Original(failing)
    with pytest.raises(KeyError, match="SGLang's own"):
        eager._init_forward_metadata(original, pair.ours.backend, batch)
    assert original.calls == 1
    assert not OUTCOME.has_failed


# --- the shadow check ---


def test_every_nth_step_is_compared_with_sglangs_own_plan(state):
    pair = make_pair(check_every=3)
    generator = torch.Generator().manual_seed(15)
    for _ in range(10):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert (state.launches, state.checks, state.mismatches) == (10, 3, 0)


def test_a_checked_step_serves_our_tensors():
    pair = make_pair(check_every=1)
    addresses = set()
    for _ in range(2):  # SGLang's of two steps are there at once, so they differ
        random_batch(pair, torch.Generator().manual_seed(17), raw_bs=4)
        addresses.add(step_and_expect_equal(pair, 4).cu_seqlens_k.data_ptr())
    assert len(addresses) == 1


def plant_error(fill):
    """Each launch gives token 5 a length that is too long by one."""
    bind = fill.bind

    def bind_wrongly(args):
        run = bind(args)
        return lambda: (run(), args.seqlens_expanded[5:6].add_(1))

    fill.bind = bind_wrongly


def plan(pair, generator):
    random_batch(pair, generator, raw_bs=4)
    pair.inputs.seq_lens.clamp_(min=DRAFT_TOKENS)
    pair.ours.plan(pair.ours.batch(4))


def test_a_difference_is_told_and_sglang_plans_from_then_on(state, caplog):
    pair = make_pair(check_every=2)
    plant_error(pair.ours.backend._nsa_draft_extend_fill)
    generator = torch.Generator().manual_seed(16)
    for _ in range(5):
        plan(pair, generator)
    assert state.launches == 2
    assert state.mismatches == 1
    assert state.first_mismatch.startswith(f"{NAMES.outputs['seqlens_expanded']}[0, 5]")
    assert state.fallbacks == {FallbackReason.DIFFERENCE_FOUND.value: 3}
    assert len([r for r in caplog.records if "the shadow check found a diff" in r.getMessage()]) == 2
    step_and_expect_equal(pair, 4)


def test_a_difference_is_told_though_the_fill_was_switched_off_meanwhile(state):
    pair = make_pair(check_every=1)
    plant_error(pair.ours.backend._nsa_draft_extend_fill)
    generator = torch.Generator().manual_seed(16)
    plan(pair, generator)
    assert state.first_mismatch is None  # the next step looks
    OUTCOME.switch(False)
    plan(pair, generator)
    assert state.first_mismatch.startswith(f"{NAMES.outputs['seqlens_expanded']}[0, 5]")
    assert OUTCOME.has_failed
    assert state.fallbacks == {FallbackReason.DIFFERENCE_FOUND.value: 1}


# --- ragged replay, 0.5.11 and 0.5.12 ---


def accepted_of(pair, generator, raw_bs, bs):
    """1 to all tokens of each request; the runner fills padded ones with all."""
    n = pair.ours.draft_tokens
    accepted = torch.full((bs,), n, dtype=torch.int32)
    accepted[:raw_bs] = torch.randint(1, n + 1, (raw_bs,), generator=generator, dtype=torch.int32)
    return accepted


@replays_ragged
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "harness",
    [{}, {"page_size": 1}, {"draft_tokens": 1}, {"draft_tokens": 6, "index_topk": 100}],
    ids=str,
)
def test_ragged_replays_equal_sglangs(backend, harness, state):
    from sglang_nsa_plugin.harness.diff import Diff

    pair = make_pair(backend, **harness)
    generator = torch.Generator().manual_seed(9)
    for bs in (2, 4, 8):
        pair.capture_setup(bs)
    result = Diff()
    for i in range(24):
        bs = (2, 4, 8)[i % 3]
        raw_bs = int(torch.randint(1, bs + 1, (), generator=generator))
        random_batch(pair, generator, raw_bs, bs)
        pair.ragged_step(bs, accepted_of(pair, generator, raw_bs, bs), result)
        assert result.first is None, result.first
    assert state.launches == 24
    assert not state.fallbacks


@replays_ragged
def test_ragged_replays_say_that_they_are_not_checked_and_end_with_a_difference(state, caplog):
    from sglang_nsa_plugin.adapters.ragged_fill import UNCHECKED

    pair = make_pair(check_every=1)
    pair.capture_setup(4)
    random_batch(pair, torch.Generator().manual_seed(12), raw_bs=4)
    accepted = torch.tensor([1, 4, 2, 3], dtype=torch.int32)
    for _ in range(2):
        pair.ours.replay(4, accepted)
    assert len([r for r in caplog.records if UNCHECKED in r.getMessage()]) == 1
    OUTCOME.fail(
        Difference(1, "cu_seqlens_k", row=0, column=1, ours=3, theirs=4, batch_size=2, length=None)
    )
    pair.ours.replay(4, accepted)
    assert (state.launches, state.checks, state.fallbacks) == (
        2,
        0,
        {FallbackReason.DIFFERENCE_FOUND.value: 1},
    )


@replays_ragged
def test_ragged_rows_behind_the_accepted_tokens_get_length_zero(pair):
    """The kernels of the graph run on all captured rows, also on those that SGLang does not fill."""
    pair.capture_setup(4)
    random_batch(pair, torch.Generator().manual_seed(10), raw_bs=4)
    for accepted in ([4, 4, 4, 4], [1, 2, 1, 3]):
        pair.ours.replay(4, torch.tensor(accepted, dtype=torch.int32))
    expanded, clamped, sums = lengths_of(pair.ours.backend.decode_cuda_graph_metadata[4])
    assert expanded[7:] == clamped[7:] == [0] * 9
    assert min(expanded[:7]) > 0 or min(pair.inputs.seq_lens.tolist()) < 4
    assert sums[7:] == [sums[7]] * 10


@replays_ragged
def test_a_ragged_replay_is_one_launch_and_asks_the_device_for_nothing(pair, monkeypatch):
    pair.capture_setup(4)
    random_batch(pair, torch.Generator().manual_seed(11), raw_bs=4)
    accepted = torch.tensor([1, 4, 2, 3], dtype=torch.int32)
    pair.ours.replay(4, accepted)  # validates the tensors
    arguments = pair.ours._replay_arguments(4, accepted)

    def asked(tensor, *_):
        raise AssertionError("the device was asked for a value")

    with pair.stub_process(), Operations() as ours:
        for name in ("tolist", "item", "cpu", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, asked)
        pair.ours.backend.init_forward_metadata_replay_cuda_graph(**arguments)
        with pytest.raises(AssertionError, match="the device was asked"):
            pair.theirs.backend.init_forward_metadata_replay_cuda_graph(**arguments)
        monkeypatch.undo()
    # up to where theirs ended
    assert set(ours.names[: ours.names.index("aten::max")]) <= VIEWS


@replays_ragged
def test_sglang_fills_a_ragged_replay_whose_fill_failed_and_all_after_it(state, caplog):
    from sglang_nsa_plugin.harness.diff import Diff, compare_planned

    accepted = torch.tensor([1, 4, 2, 3], dtype=torch.int32)

    def expect_sglangs_values(pair):
        result = Diff()
        pair.theirs.sglang_replay(4, accepted)
        ours, theirs = (one.backend.decode_cuda_graph_metadata[4] for one in (pair.ours, pair.theirs))
        compare_planned(ours, theirs, NAMES, result, rows_per_request=accepted)
        assert result.first is None, result.first
        assert pair.ours.backend.forward_metadata is ours

    def run(number: int) -> list[str]:
        caplog.clear()
        fresh()
        pair = make_pair()
        pair.capture_setup(4)
        long_enough_batch(pair, torch.Generator().manual_seed(number), raw_bs=4)
        backend = pair.ours.backend
        original = sglangs(type(backend).init_forward_metadata_replay_cuda_graph)
        arguments = pair.ours._replay_arguments(4, accepted)
        with pair.stub_process(), failing_call(number) as failed:
            eager._replay(original, backend, **arguments)
        expect_sglangs_values(pair)
        if failed:
            assert (original.calls, OUTCOME.has_failed) == (1, True), failed
            assert len(errors_of(caplog)) == 1, failed
            assert not hasattr(backend, eager.RAGGED_ATTRIBUTE)
            pair.ours.replay(4, accepted)
            expect_sglangs_values(pair)
        return failed

    assert {"RaggedFill.replay", "read", "run"} <= set(every_call(run))


@replays_ragged
def test_ragged_metadata_and_addresses_never_change(pair):
    """F17: the captured forward reads by address."""
    generator = torch.Generator().manual_seed(12)
    pair.capture_setup(2)
    metadata = pair.ours.backend.decode_cuda_graph_metadata[2]
    tensors = {n: t for n, t in vars(metadata).items() if isinstance(t, torch.Tensor)}
    for _ in range(3):
        random_batch(pair, generator, raw_bs=2)
        pair.ours.replay(2, accepted_of(pair, generator, 2, 2))
        assert pair.ours.backend.forward_metadata is metadata
        assert all(getattr(metadata, name) is tensor for name, tensor in tensors.items())


@replays_ragged
def test_a_graph_with_too_few_table_rows_goes_to_sglang(pair, state):
    """SGLang's page table has steps + 1 rows a request; a tree of drafts has more tokens than that."""
    pair.capture_setup(4)
    random_batch(pair, torch.Generator().manual_seed(13), raw_bs=4)
    metadata = pair.ours.backend.decode_cuda_graph_metadata[4]
    object.__setattr__(metadata, "page_table_1", metadata.page_table_1[:12])
    pair.ours.replay(4, torch.tensor([1, 2, 1, 3], dtype=torch.int32))
    assert state.fallbacks == {FallbackReason.OTHER_TABLE_ROWS.value: 1}
    assert pair.ours.backend.forward_metadata is metadata  # by SGLang


@replays_ragged
def test_a_ragged_batch_without_a_length_for_each_request_goes_to_sglang(pair, state):
    pair.capture_setup(4)
    random_batch(pair, torch.Generator().manual_seed(14), raw_bs=4)
    with pytest.raises(RuntimeError, match="repeat"):  # SGLang's own answer
        pair.ours.replay(4, torch.tensor([1, 2, 1], dtype=torch.int32))
    assert state.fallbacks == {FallbackReason.OTHER_SIZES.value: 1}
    assert state.launches == 0


# --- releases that do not fit ---

ACTIVATE = """
import json, sys
from types import SimpleNamespace
from sglang.srt.layers.attention import NAME_backend as module
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
Backend, Metadata = module.BACKEND, module.METADATA
CHANGE
load_plugins()
from sglang_nsa_plugin import plugin
from sglang_nsa_plugin.state import record
backend = sys.argv[1]
plugin.activate(SimpleNamespace(
    speculative_algorithm="EAGLE", attention_backend="nsa", _nsa_metadata_backend=backend))
hooked = [target for target in HookRegistry._patched if "_backend." in target]
print(json.dumps({"record": record(), "hooked": hooked}))
"""


def activate(change: str, backend: str = "auto"):
    program = (
        ACTIVATE.replace("CHANGE", change)
        .replace("NAME", NAMES.prefix)
        .replace("BACKEND", NAMES.backend.rpartition(".")[2])
        .replace("METADATA", NAMES.metadata)
    )
    return isolated.run(program, backend)


def outcome_of(change: str):
    done = activate(change)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_this_release_fits():
    outcome = outcome_of("")
    assert outcome["record"]["adapter"] == "eager"
    assert outcome["record"]["reason"] == "waiting for the attention backend"
    assert len(outcome["hooked"]) == (3 if NAMES is eager_names.NSA else 2)


CHANGES = [
    (
        "Backend.__init__ = lambda self, model_runner: None",
        "__init__ takes (self, model_runner), expected (self, model_runner, skip_prefill,",
    ),
    (
        "Backend.init_forward_metadata = lambda self, forward_batch, new: None",
        "init_forward_metadata takes (self, forward_batch, new), expected (self, forward_batch)",
    ),
    ("del Backend._compute_flashmla_metadata", "_compute_flashmla_metadata is missing"),
    (
        "del Metadata.__dataclass_fields__['real_page_table']",
        f"{NAMES.metadata} has no field real_page_table",
    ),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_release_that_does_not_fit_is_declined_by_what_changed(change, said):
    outcome = outcome_of(change)
    assert outcome["hooked"] == []
    assert outcome["record"]["adapter"] is None
    assert outcome["record"]["reason"].startswith("this SGLang does not fit the eager adapter: ")
    assert said in outcome["record"]["reason"]


def test_a_new_field_of_the_metadata_is_declined(pair, monkeypatch):
    """It would be left empty in silence."""
    from sglang_nsa_plugin.adapters import eager

    of_class = type(make_metadata(pair)).__dataclass_fields__
    monkeypatch.setitem(of_class, "new_plan", of_class["seq_lens_sum"])
    monkeypatch.setattr(of_class["seq_lens_sum"], "name", "new_plan")
    why_not = eager.why_unsupported(pair.ours.backend, pair.ours.model_runner, NAMES)
    assert why_not == f"{NAMES.metadata} has unknown fields: new_plan"


def make_metadata(pair):
    pair.ours.plan(pair.ours.batch(1))
    return pair.ours.backend.forward_metadata


def test_another_plugin_on_the_same_target_is_named():
    """The registry applies hooks once a target: ours come after and would silently be left out."""
    target = f"{NAMES.backend}.init_forward_metadata"
    change = (
        f"HookRegistry.register({target!r}, lambda original, *a, **k: original(*a, **k), "
        "HookType.AROUND)"
    )
    reason = outcome_of(change)["record"]["reason"]
    assert reason == f"another plugin patched {target} before"

    by_name = activate(change, "torch")
    assert by_name.returncode != 0
    assert "torch was asked for by name and cannot be used: another plugin" in by_name.stderr
