"""The eager adapter on SGLang's real backend object, with its real kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang", reason="needs SGLang with its GPU packages")

from sglang_nsa_plugin.adapters import eager_names, in_graph  # noqa: E402

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


def make_twin(decode_impl: str = "flashmla_sparse", backend: str = "auto", **rig: object):
    from sglang_nsa_plugin.cli.eager_twin import EagerTwin

    settings = {"draft_tokens": DRAFT_TOKENS, "decode_impl": decode_impl, **rig}
    return EagerTwin(torch.device("cuda", 0), (1, 2, 4, 8, MAX_BS), backend, **settings)


def random_batch(twin, generator, bs=None):
    """Lengths as a server has them: they count the rows of the step."""
    from sglang_nsa_plugin.cli.batches import random_step

    bs = bs or int(torch.randint(1, MAX_BS + 1, (), generator=generator))
    longest = twin.ours.backend.max_context_len
    random_step(twin.inputs, generator, bs, bs, DRAFT_TOKENS, longest)
    twin.inputs.seq_lens.clamp_(min=DRAFT_TOKENS)
    return bs


def plans_schedule() -> bool:
    """0.5.11 leaves the schedule of an eager step to the indexer."""
    import importlib

    from sglang_nsa_plugin.adapters.eager_fill import plans_2d

    return plans_2d(importlib.import_module(NAMES.module))


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_every_field_equals_sglangs(decode_impl):
    from sglang_nsa_plugin.cli.replay import Comparison
    from sglang_nsa_plugin.state import STATE

    twin = make_twin(decode_impl)
    result, launches = Comparison(), STATE.launches
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        twin.step(random_batch(twin, generator), result)
    assert result.first is None, result.first
    assert STATE.backend == "cuda"
    assert STATE.launches - launches == 100
    assert not STATE.fallbacks
    assert (result.compared["paged_mqa_schedule_metadata"] > 0) == plans_schedule()
    assert (result.compared["flashmla num_splits"] > 0) == (decode_impl == "flashmla_kv")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_other_implementations(backend):
    from sglang_nsa_plugin.cli.replay import Comparison

    twin = make_twin(backend=backend)
    result, generator = Comparison(), torch.Generator().manual_seed(2)
    for _ in range(10):
        twin.step(random_batch(twin, generator), result)
    assert result.first is None, result.first


def test_long_contexts():
    from sglang_nsa_plugin.cli.replay import Comparison

    twin = make_twin(context_len=163_840, pool_size=17)
    result, generator = Comparison(), torch.Generator().manual_seed(3)
    for _ in range(10):
        twin.step(random_batch(twin, generator), result)
    assert result.first is None, result.first


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_rows_of_dp_padding(decode_impl):
    from sglang_nsa_plugin.cli.replay import Comparison

    twin = make_twin(decode_impl)
    result, generator = Comparison(), torch.Generator().manual_seed(4)
    for others in (0, 8, 64):
        bs = random_batch(twin, generator)
        twin.step(bs, result, [bs * DRAFT_TOKENS, others])
    assert result.first is None, result.first


def test_the_next_step_does_not_reach_into_the_running_one():
    """Both write the same memory: whatever was enqueued behind a step still reads that step's values."""
    twin = make_twin()
    generator = torch.Generator().manual_seed(5)
    random_batch(twin, generator, bs=8)
    twin.ours.plan(twin.ours.batch(8))
    batch = twin.ours.batch(8)
    twin.theirs.sglang_plan(batch)
    expected = twin.theirs.backend.forward_metadata
    random_batch(twin, generator, bs=8)
    following = twin.ours.batch(8)
    torch.cuda.synchronize()

    twin.ours.plan(batch)
    metadata = twin.ours.backend.forward_metadata
    torch.cuda._sleep(200_000_000)
    read = {name: getattr(metadata, name).clone() for name in LENGTHS}
    twin.ours.plan(following)
    torch.cuda.synchronize()
    for name, tensor in read.items():
        assert torch.equal(tensor, getattr(expected, name)), name
        assert not torch.equal(tensor, getattr(twin.ours.backend.forward_metadata, name)), name


LENGTHS = ("cache_seqlens_int32", "cu_seqlens_k", NAMES.seqlens_expanded, NAMES.cu_seqlens_k)


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
    twin = make_twin(decode_impl)
    bs = random_batch(twin, torch.Generator().manual_seed(6), bs=8)
    metadata = SimpleNamespace()

    def derived():
        fill = twin.ours.backend._nsa_draft_extend_fill
        rows = bs * DRAFT_TOKENS
        metadata.derived = fill._derived(fill._lengths_of(bs, rows, rows))

    with twin.stand_ins():
        ours = launches_of(twin.before_replay(bs))
        theirs = launches_of(twin.sglang_before_replay(bs))
        rest = launches_of(derived)
    with capsys.disabled():
        print(f"\n{decode_impl}: {len(ours)} launches instead of {len(theirs)}, {len(rest)} derived")
    assert sum("fill_static_kernel" in name or "fill_ragged_kernel" in name for name in ours) == 1
    assert len(ours) == 1 + len(rest)
    assert len(theirs) - len(rest) > 12


@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_nothing_is_synchronised(decode_impl):
    twin = make_twin(decode_impl)
    bs = random_batch(twin, torch.Generator().manual_seed(7))
    call = twin.before_replay(bs)
    with twin.stand_ins():
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
    from sglang_nsa_plugin.cli.replay import Comparison

    twin = make_twin(decode_impl)
    generator = torch.Generator().manual_seed(8)
    for bs in (1, 2, 8):
        random_batch(twin, generator, bs)
        twin.capture_setup(bs)
    result = Comparison()
    for i in range(30):
        bs = random_batch(twin, generator, (1, 2, 8)[i % 3])
        twin.ragged_step(bs, accepted_of(generator, bs), result)
    assert result.first is None, result.first


@replays_ragged
def test_a_ragged_schedule_is_made_over_all_captured_rows():
    """The kernels of the graph take a schedule for as many rows as they run on."""
    import importlib

    from sglang_nsa_plugin.adapters.eager_fill import schedule_of

    twin = make_twin()
    generator = torch.Generator().manual_seed(9)
    random_batch(twin, generator, bs=8)
    twin.capture_setup(8)
    twin.ours.replay(8, accepted_of(generator, 8))
    metadata = twin.ours.backend.decode_cuda_graph_metadata[8]
    schedule = schedule_of(importlib.import_module(NAMES.module))
    lengths = getattr(metadata, NAMES.seqlens_expanded)
    assert lengths.shape == (8 * DRAFT_TOKENS,)
    assert int(lengths.min()) == 0
    assert torch.equal(metadata.paged_mqa_schedule_metadata, schedule(lengths))


@replays_ragged
def test_a_ragged_replay_synchronises_nothing_where_sglangs_does():
    twin = make_twin()
    generator = torch.Generator().manual_seed(10)
    random_batch(twin, generator, bs=8)
    twin.capture_setup(8)
    accepted = accepted_of(generator, 8)
    twin.ours.replay(8, accepted)
    twin.theirs.replay(8, accepted)
    ours, theirs = (rig._replay_arguments(8, accepted) for rig in (twin.ours, twin.theirs))
    with twin.stand_ins():
        without_synchronisation(
            lambda: twin.ours.backend.init_forward_metadata_replay_cuda_graph(**ours)
        )
        with pytest.raises(RuntimeError, match="synchroniz"):
            without_synchronisation(
                lambda: twin.theirs.backend.init_forward_metadata_replay_cuda_graph(**theirs)
            )
