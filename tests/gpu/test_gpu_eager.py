"""The eager adapter on SGLang's real backend object, with its real kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang", reason="needs SGLang with its GPU packages")

from sglang_nsa_plugin.adapters import eager_names, fields, in_graph  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        in_graph.is_generation(), reason="this SGLang captures draft-extend in graphs: not eager"
    ),
]
NAMES = eager_names.names_of_generation()
replays_ragged = pytest.mark.skipif(
    NAMES is eager_names.DSA, reason="this SGLang has no ragged replay any more: 0.5.12 was the last"
)

MAX_BS = 16
DRAFT_TOKENS = 4


def pair_for_installed(decode_impl: str = "flashmla_sparse", backend: str = "auto", **harness: object):
    from sglang_nsa_plugin.harness.eager_pair import EagerPair

    settings = {"draft_tokens": DRAFT_TOKENS, "decode_impl": decode_impl, **harness}
    return EagerPair(torch.device("cuda", 0), (1, 2, 4, 8, MAX_BS), backend, **settings)


def random_batch(pair, generator, bs=None):
    """Lengths as a server has them: they count the rows of the step."""
    from sglang_nsa_plugin.harness.inputs import random_step

    bs = bs or int(torch.randint(1, MAX_BS + 1, (), generator=generator))
    longest = pair.ours.backend.max_context_len
    random_step(pair.inputs, generator, bs, bs, DRAFT_TOKENS, longest)
    pair.inputs.seq_lens.clamp_(min=DRAFT_TOKENS)
    return bs


def plans_schedule() -> bool:
    """0.5.11 leaves the schedule of an eager step to the indexer."""
    import importlib

    from sglang_nsa_plugin.adapters.eager_fill import plans_2d

    return plans_2d(importlib.import_module(NAMES.module))


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_every_field_equals_sglangs(decode_impl):
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.state import STATE

    pair = pair_for_installed(decode_impl)
    result, launches = Diff(), STATE.launches
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first
    assert STATE.backend == "cuda"
    assert STATE.launches - launches == 100
    assert not STATE.fallbacks
    assert (result.compared["paged_mqa_schedule_metadata"] > 0) == plans_schedule()
    assert (result.compared["flashmla num_splits"] > 0) == (decode_impl == "flashmla_kv")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_other_implementations(backend):
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed(backend=backend)
    result, generator = Diff(), torch.Generator().manual_seed(2)
    for _ in range(10):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first


def test_long_contexts():
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed(context_len=163_840, pool_size=17)
    result, generator = Diff(), torch.Generator().manual_seed(3)
    for _ in range(10):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_rows_of_dp_padding(decode_impl):
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed(decode_impl)
    result, generator = Diff(), torch.Generator().manual_seed(4)
    for others in (0, 8, 64):
        bs = random_batch(pair, generator)
        pair.step(bs, result, [bs * DRAFT_TOKENS, others])
    assert result.first is None, result.first


def test_the_next_step_does_not_reach_into_the_running_one():
    """Both write the same memory: whatever was enqueued behind a step still reads that step's values."""
    pair = pair_for_installed()
    generator = torch.Generator().manual_seed(5)
    random_batch(pair, generator, bs=8)
    pair.ours.plan(pair.ours.batch(8))
    batch = pair.ours.batch(8)
    pair.theirs.sglang_plan(batch)
    expected = pair.theirs.backend.forward_metadata
    random_batch(pair, generator, bs=8)
    following = pair.ours.batch(8)
    torch.cuda.synchronize()

    pair.ours.plan(batch)
    metadata = pair.ours.backend.forward_metadata
    torch.cuda._sleep(200_000_000)
    read = {name: getattr(metadata, name).clone() for name in LENGTHS}
    pair.ours.plan(following)
    torch.cuda.synchronize()
    for name, tensor in read.items():
        assert torch.equal(tensor, getattr(expected, name)), name
        assert not torch.equal(tensor, getattr(pair.ours.backend.forward_metadata, name)), name


LENGTHS = [NAMES.outputs[name] for name in fields.LENGTHS if name != "nsa_cache_seqlens"]


def launches_of(call) -> list[str]:
    """Names of the kernels, copies and fills that a call enqueues."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_device]


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
@pytest.mark.unsanitized("the profiler and the tool cannot both be attached")
def test_one_launch_beside_sglangs_derived_tables(decode_impl, capsys):
    pair = pair_for_installed(decode_impl)
    bs = random_batch(pair, torch.Generator().manual_seed(6), bs=8)
    metadata = SimpleNamespace()

    def derived():
        fill = pair.ours.backend._nsa_draft_extend_fill
        rows = bs * DRAFT_TOKENS
        metadata.derived = fill._derived(fill._lengths_of(bs, rows, rows))

    with pair.stub_process():
        ours = launches_of(pair.before_replay(bs))
        theirs = launches_of(pair.sglang_before_replay(bs))
        rest = launches_of(derived)
    with capsys.disabled():
        print(f"\n{decode_impl}: {len(ours)} launches instead of {len(theirs)}, {len(rest)} derived")
    assert sum("fill_static_kernel" in name or "fill_ragged_kernel" in name for name in ours) == 1
    assert len(ours) == 1 + len(rest)
    assert len(theirs) - len(rest) > 12


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_nothing_is_synchronised(decode_impl):
    pair = pair_for_installed(decode_impl)
    bs = random_batch(pair, torch.Generator().manual_seed(7))
    call = pair.before_replay(bs)
    with pair.stub_process():
        call()
        without_synchronisation(call)


def without_synchronisation(call) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def accepted_of(generator, bs):
    return torch.randint(1, DRAFT_TOKENS + 1, (bs,), generator=generator, dtype=torch.int32).cuda()


@replays_ragged
@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_ragged_replays_equal_sglangs(decode_impl):
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed(decode_impl)
    generator = torch.Generator().manual_seed(8)
    for bs in (1, 2, 8):
        random_batch(pair, generator, bs)
        pair.capture_setup(bs)
    result = Diff()
    for i in range(30):
        bs = random_batch(pair, generator, (1, 2, 8)[i % 3])
        pair.ragged_step(bs, accepted_of(generator, bs), result)
    assert result.first is None, result.first


@replays_ragged
def test_a_ragged_schedule_is_made_over_all_captured_rows():
    """The kernels of the graph take a schedule for as many rows as they run on."""
    import importlib

    from sglang_nsa_plugin.adapters.eager_fill import schedule_of

    pair = pair_for_installed()
    generator = torch.Generator().manual_seed(9)
    random_batch(pair, generator, bs=8)
    pair.capture_setup(8)
    pair.ours.replay(8, accepted_of(generator, 8))
    metadata = pair.ours.backend.decode_cuda_graph_metadata[8]
    schedule = schedule_of(importlib.import_module(NAMES.module))
    lengths = getattr(metadata, NAMES.outputs["seqlens_expanded"])
    assert lengths.shape == (8 * DRAFT_TOKENS,)
    assert int(lengths.min()) == 0
    assert torch.equal(metadata.paged_mqa_schedule_metadata, schedule(lengths))


@replays_ragged
def test_a_ragged_replay_synchronises_nothing_where_sglangs_does():
    pair = pair_for_installed()
    generator = torch.Generator().manual_seed(10)
    random_batch(pair, generator, bs=8)
    pair.capture_setup(8)
    accepted = accepted_of(generator, 8)
    pair.ours.replay(8, accepted)
    pair.theirs.replay(8, accepted)
    ours, theirs = (one._replay_arguments(8, accepted) for one in (pair.ours, pair.theirs))
    with pair.stub_process():
        without_synchronisation(
            lambda: pair.ours.backend.init_forward_metadata_replay_cuda_graph(**ours)
        )
        with pytest.raises(RuntimeError, match="synchroniz"):
            without_synchronisation(
                lambda: pair.theirs.backend.init_forward_metadata_replay_cuda_graph(**theirs)
            )
