"""Models with a pooled index in the graph: SGLang's real backends of each role, on CPU tensors.

SGLang's own code fills a second backend over the same inputs, and every live value is compared. It fills
by torch, and in one test by its fused kernels. Schedules and top-k plans are None on the CPU.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    CPU,
    expect_equal,
    expect_every_replay_to_be_checked,
    make_pair,
    on_the_cpu,
    plan_and_expect_nothing_written,
    plant_error,
    random_batch,
    replay_and_expect_equal,
    step_and_expect_equal,
)
from test_switch import ask

from sglang_nsa_plugin import options, plugin
from sglang_nsa_plugin.adapters import fields, kpool, supported, taken_over
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.adapters.roles import DRAFT_EXTEND_ROLE
from sglang_nsa_plugin.harness import diff, process_stubs
from sglang_nsa_plugin.state import STATES

pytestmark = on_the_cpu

PAGE = kpool.PAGE_SIZE
ROLES = kpool.ROLES_COVERED
WHY_UNSUPPORTED = {
    "draft-extend": supported.why_draft_extend_unsupported,
    "draft-decode": supported.why_draft_decode_unsupported,
    "verify": supported.why_verify_unsupported,
}


def sglangs(module: str):
    """SGLang's module for a pooled index; skips the test where SGLang has none."""
    try:
        return importlib.import_module(f"sglang.srt.layers.attention.dsa.{module}")
    except ModuleNotFoundError:
        pytest.skip("this SGLang has no k-pooling; 0.5.20 and later have")


@pytest.fixture(autouse=True)
def _has_kpool():
    sglangs("kpool_plan")


def numbers_server_pages() -> bool:
    """Since 0.5.22."""
    return hasattr(
        sglangs("dsa_backend_kpool").DeepseekSparseAttnBackendKPoolMixin, "_kpool_index_page_size"
    )


def settings(index_kpool: int = 4, **harness: object) -> dict[str, object]:
    from sglang_nsa_plugin.harness.graph_backend import page_size_of

    sizes = {"context_len": 256, "index_topk": 128, "page_size": page_size_of(index_kpool)}
    return {**sizes, "index_kpool": index_kpool, **harness}


def make(role: str, backend: str = "auto", **harness: object):
    return make_pair(backend, role=role, **settings(**harness))


def harness_backend(role: str = "draft-extend", **harness: object):
    from sglang_nsa_plugin.harness.graph_backend import GraphBackend

    return GraphBackend(CPU, role=role, **settings(**harness))


def activate(roles: tuple[str, ...] | None, backend: str = "auto") -> None:
    """What the plugin does at the start of a server; None leaves the roles to the default."""
    server_args = SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="dsa")
    setattr(server_args, options.ATTRIBUTE, backend)
    setattr(server_args, options.ROLES_ATTRIBUTE, roles)
    plugin.activate(server_args)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        ("auto", {"index_kpool": 4}),
        ("torch", {"index_kpool": 4, "draft_tokens": 6}),
        ("auto", {"index_kpool": 2, "draft_tokens": 7, "index_topk": 64}),
    ],
    ids=str,
)
def test_every_value_equals_sglangs_fill(role, backend, shape, state):
    pair = make(role, backend, **shape)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        compared = step_and_expect_equal(pair, random_batch(pair, generator)).compared
    report = STATES[role]
    assert (report.adapter, report.replays, report.fallbacks) == ("in-graph", 6, {})
    assert set(pair.fills().captured) == set(BATCH_SIZES)
    assert set(filled(pair)) <= compared.keys()


@pytest.mark.parametrize("role", ROLES)
def test_every_value_equals_that_of_sglangs_fused_kernels(role, state):
    """Which is how SGLang fills on CUDA."""
    pair = make(role)
    for backend in pair.theirs.steps():
        process_stubs.launch_fused_on_cpu(backend)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        step_and_expect_equal(pair, random_batch(pair, generator, raw_bs=2))


def filled(pair) -> list[str]:
    """SGLang's names of the pooled tensors that this role has."""
    metadata = pair.metadata(1)
    paths = [path for paths in fields.KPOOL.values() for path in paths]
    return [path for path in paths if fields.at(metadata, path) is not None]


def test_each_role_has_the_tensors_that_its_plan_has(state):
    names = {role: {name.rsplit(".", 1)[-1] for name in filled(make(role))} for role in ROLES}
    plan = {"req", "write_start", "tail_logical_start", "write_loc"}
    rows = {"seqlens_per_q", "pool_seqlens_per_q"}
    table = {"pooled_real_page_table"}
    assert names == {
        "draft-decode": plan | table | {"pooled_cache_seqlens_int32"},
        "verify": plan | rows | (table if numbers_server_pages() else set()),
        "draft-extend": plan | rows | {"effective_n_per_batch"},
    }


def test_the_draft_steps_share_the_pooled_tensors(state):
    pair = make("draft-decode")
    first, second = pair.ours.metadata(2)
    assert first.kpool_write_plan is second.kpool_write_plan
    first, second = pair.theirs.metadata(2)
    assert first.kpool_write_plan is not second.kpool_write_plan


# --- which roles ---


def test_without_a_flag_every_role_is_filled(state):
    activate(roles=None)
    assert all(taken_over.ATTRIBUTE in vars(harness_backend(role).backend) for role in ROLES)


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_role_that_is_left_out_stays_with_sglang(by, state, monkeypatch):
    if by == "variable":
        monkeypatch.setenv(options.ROLES_VARIABLE, "draft-extend")
    activate(roles=("draft-extend",) if by == "flag" else None)
    assert taken_over.ATTRIBUTE in vars(harness_backend().backend)
    assert taken_over.ATTRIBUTE not in vars(harness_backend("verify").backend)


# --- what is declined by name ---


@pytest.mark.parametrize("role", ROLES)
def test_without_sglangs_fused_metadata_it_is_declined(role, state):
    from sglang.srt.environ import envs

    activate(roles=(role,))
    with envs.SGLANG_EXPERIMENTAL_DSA_KPOOL_METADATA_FUSION.override(False):
        made = harness_backend(role)
    assert taken_over.ATTRIBUTE not in vars(made.backend)
    assert STATES[role].reason.startswith(
        "index k-pooling (4) is not supported without SGLang's fused metadata"
    )


@pytest.mark.parametrize("index_kpool", [3, 4])
def test_a_geometry_that_sglang_does_not_fuse_is_declined(index_kpool, state):
    """3 tokens divide no page, and 130 of sparse attention are no multiple of 4."""
    activate(roles=("draft-extend",))
    harness_backend(index_kpool=index_kpool, index_topk=130)
    assert "is not supported without SGLang's fused metadata" in STATES["draft-extend"].reason


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (
            "pages",
            "index k-pooling (4) is not supported with 32 k-pools in a page of the index, only 64",
        ),
        ("dcp", "decode context parallelism (dcp_size 2)"),
        ("release", "this SGLang does not fit the fill of index k-pooling (4): "),
        ("field", "this SGLang does not fit the fill of index k-pooling (4): "),
        ("method", "this SGLang does not fit the fill of index k-pooling (4): "),
        ("accepted", "this SGLang does not fit the fill of index k-pooling (4): "),
        (None, None),
    ],
)
def test_what_else_is_declined_by_name(role, planted, said, state, monkeypatch):
    activate(roles=(role,))
    made, plan = harness_backend(role), sglangs("kpool_plan")
    for step in made.steps():
        step.experimental_kpool_metadata_fusion = True
    server_args = {"dcp_size": 2} if planted == "dcp" else {}
    runner = SimpleNamespace(
        server_args=process_stubs.publish_server_args(speculative_algorithm="EAGLE", **server_args),
        shared_read_done_event=None,
    )
    size = "_kpool_index_page_size" if numbers_server_pages() else "_kpool_slots_per_page"
    if planted == "pages":
        monkeypatch.setattr(type(made.steps()[0]), size, lambda backend: 32)
    if planted == "release":
        monkeypatch.delattr(plan, "_compute_pool_schedule_metadata")
    if planted == "field":
        monkeypatch.setattr(plan, "KPoolWritePlan", dataclasses.make_dataclass("Renamed", ["request"]))
    if planted == "method":
        monkeypatch.delattr(sglangs("dsa_backend_kpool").DeepseekSparseAttnBackendKPoolMixin, size)
    if planted == "accepted":
        newer = dataclasses.make_dataclass("Renamed", ["num_correct_drafts"])
        monkeypatch.setattr("sglang.srt.speculative.eagle_info.EagleDraftExtendInput", newer)
    why_not = WHY_UNSUPPORTED[role](made.backend, runner)
    assert (why_not is None) if said is None else (said in why_not)


def test_another_role_is_declined_by_name(state):
    role = dataclasses.replace(DRAFT_EXTEND_ROLE, name="decode")
    why_not = kpool.why_unsupported(harness_backend().backend, SimpleNamespace(), role)
    assert why_not == "index k-pooling (4) is not supported for decode"


def test_a_tensor_of_the_write_plan_that_is_not_known_is_declined(state, caplog):
    """A newer SGLang may write it before each replay."""

    @dataclasses.dataclass(frozen=True)
    class NewerPlan(sglangs("kpool_plan").KPoolWritePlan):
        newer: torch.Tensor | None = None

    pair = make("verify")
    metadata, fills = pair.metadata(2), pair.fills()
    plan = metadata.kpool_write_plan
    parts = {each.name: getattr(plan, each.name) for each in dataclasses.fields(plan)}
    newer = dataclasses.replace(metadata, kpool_write_plan=NewerPlan(**parts, newer=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"kpool_write_plan\.newer: DSAMetadata has tensors here"):
        fills._args(pair.ours.capture_batch(2), newer)


def test_both_places_of_one_tensor_are_refused(state):
    """Graphs would read two, of which one was filled."""
    metadata = make("verify").metadata(2)
    object.__setattr__(metadata, "pooled_cache_seqlens_int32", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="pooled_cache_seqlens_int32, kpool_write_plan"):
        fields.read_kpool(metadata)


# --- fallback and back ---


@pytest.mark.parametrize("role", ["verify", "draft-extend"])
def test_replaced_inputs_go_through_sglang_and_back(role, state):
    pair = make(role)
    generator = torch.Generator().manual_seed(6)
    bs = random_batch(pair, generator, raw_bs=2)
    step_and_expect_equal(pair, bs)
    view = pair.ours.replay_view(bs)
    view.seq_lens = view.seq_lens.clone()
    kept = pair.inputs.seq_lens.clone()
    pair.inputs.seq_lens.fill_(1)  # what the captured fill would read
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    pair.replay_graph(bs)
    pair.inputs.seq_lens.copy_(kept)
    pair.theirs.sglang_fill(bs)
    expect_equal(pair, bs)
    assert STATES[role].fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}
    step_and_expect_equal(pair, random_batch(pair, generator, raw_bs=2))


def replay_with(pair, bs, **spec_info) -> None:
    view = pair.ours.replay_view(bs)
    vars(view.spec_info).update(spec_info)
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    pair.replay_graph(bs)


def test_accepted_tokens_that_the_runner_did_not_copy_go_to_sglang(state):
    """The graph reads the runner's buffer, so it must hold what the batch has."""
    pair = make("draft-extend")
    bs = random_batch(pair, torch.Generator().manual_seed(4), raw_bs=2)
    replay_with(pair, bs, num_accept_tokens=torch.tensor([9, 9], dtype=torch.int32))
    assert state.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}
    assert pair.metadata(bs).kpool_write_plan.effective_n_per_batch.tolist() == [9, 9]


def test_a_batch_without_accepted_tokens_goes_to_sglang(state):
    """Draft-extend's runner copies them only if it has how many drafts were correct."""
    pair = make("draft-extend")
    bs = random_batch(pair, torch.Generator().manual_seed(5), raw_bs=2)
    step_and_expect_equal(pair, bs)
    for spec_info in ({"num_correct_drafts": None}, {"num_accept_tokens": None}):
        replay_with(pair, bs, **spec_info)
    assert state.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 2}
    step_and_expect_equal(pair, bs)


def test_the_host_waits_once_for_the_accepted_tokens(state, monkeypatch):
    pair = make("draft-extend")
    bs = random_batch(pair, torch.Generator().manual_seed(7), raw_bs=2)
    step_and_expect_equal(pair, bs)
    monkeypatch.setattr(torch, "equal", None)
    replay_and_expect_equal(pair, bs)
    assert state.replays == 2


def test_of_a_padded_batch_the_buffers_themselves_prove_nothing(state):
    pair = make("draft-extend")
    bs = random_batch(pair, torch.Generator().manual_seed(8), raw_bs=2)
    replay_with(pair, bs, num_accept_tokens=pair.inputs.accept_lens[:bs])
    assert state.replays == 1
    replay_with(pair, bs, num_accept_tokens=torch.tensor([9, 9], dtype=torch.int32))
    assert state.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}


# --- the switch ---


@pytest.mark.parametrize("role", ROLES)
def test_off_hands_every_step_to_sglang_and_on_takes_it_back(role, state):
    pair = make(role)
    generator = torch.Generator().manual_seed(1)
    for round_ in (1, 2):
        for _ in range(2):
            step_and_expect_equal(pair, random_batch(pair, generator, raw_bs=2))
        assert ask(nsa_metadata=0)
        replay_and_expect_equal(pair, random_batch(pair, generator, raw_bs=2))
        assert STATES[role].replays == 2 * round_
        assert STATES[role].fallbacks == {FallbackReason.SWITCHED_OFF.value: round_}
        assert ask(nsa_metadata=1)


@pytest.mark.parametrize("role", ROLES)
def test_a_captured_fill_that_is_switched_off_writes_nothing(role, state):
    pair = make(role)
    bs = random_batch(pair, torch.Generator().manual_seed(2), raw_bs=2)
    step_and_expect_equal(pair, bs)
    ask(nsa_metadata=0)
    plan_and_expect_nothing_written(pair, bs)


# --- the shadow check ---


@pytest.mark.parametrize("role", ["draft-decode", "verify"])
def test_every_replay_is_checked_before_the_next_and_equal(role, state):
    expect_every_replay_to_be_checked(make(role, check_every=1), least_values=17 * 20)


def test_every_replay_of_draft_extend_is_checked_and_equal(state):
    pair = make("draft-extend", check_every=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        replay_and_expect_equal(pair, random_batch(pair, generator))
    assert (state.checks, state.mismatches) == (6, 0)
    assert not OUTCOMES["draft-extend"].has_failed


@pytest.mark.parametrize("role", ROLES)
def test_an_error_in_each_pooled_tensor_is_found(role, state, monkeypatch):
    names = filled(make(role))
    assert len(names) >= 6
    for name in names:
        with monkeypatch.context() as patch:
            plant_error(name, patch)
            pair = make(role, check_every=1)
            generator = torch.Generator().manual_seed(3)
            for _ in range(3):
                pair.replay(random_batch(pair, generator, raw_bs=1))
        report = STATES[role]
        assert (report.first_mismatch or "").startswith(f"{name}["), name
        report.__init__(role)  # the next pair of this role starts anew
        OUTCOMES[role].__init__(report)


# --- what SGLang's own functions derive ---


@pytest.mark.parametrize("role", ROLES)
def test_what_the_fill_does_not_write_is_made_by_sglangs_functions_in_place(role, state, monkeypatch):
    pair = make(role)
    bs, fills = 2, pair.fills()
    metadata = pair.metadata(bs)
    in_plan = role != "draft-decode"
    schedule, topk_plan = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    owner = metadata.kpool_write_plan if in_plan else metadata
    lengths = owner.pool_seqlens_per_q if in_plan else owner.pooled_cache_seqlens_int32
    names = [fields.KPOOL["kpool_schedule"][in_plan], fields.KPOOL_TOPK_PLAN[in_plan]]
    has_plan = hasattr(owner, names[1].rsplit(".", 1)[-1])  # since 0.5.23
    object.__setattr__(owner, names[0].rsplit(".", 1)[-1], schedule)
    asked = []

    def schedule_of(pool_seqlens, **page_size):
        asked.append((pool_seqlens, *page_size.values()))
        return torch.full((3, 2), 5, dtype=torch.int32)

    monkeypatch.setattr(sglangs("kpool_plan"), "_compute_pool_schedule_metadata", schedule_of)
    if has_plan:
        object.__setattr__(owner, names[1].rsplit(".", 1)[-1], topk_plan)
        refresh = lambda plan, pool_lens: plan.fill_(int(pool_lens is lengths) + 6)  # noqa: E731
        monkeypatch.setattr(sglangs("kpool_fp8_index"), "refresh_kpool_topk_v2_plan", refresh)
    fills.refresh_derived(metadata)
    assert [(each is lengths, size) for each, size in asked] == [(True, PAGE)]
    assert schedule.unique().tolist() == [5]
    assert topk_plan.unique().tolist() == [7 if has_plan else 0]
    assert "kpool_schedule" not in captured_args(pair, bs).outputs()


@pytest.mark.parametrize("role", ROLES)
def test_top_k_plans_of_k_pools_are_compared_on_a_gpu(role, state, monkeypatch):
    """By demo and the tests, since 0.5.23; here plans that are made up.

    SGLang compiles its kernel to say whether it writes a plan of so few rows.
    """
    monkeypatch.setattr(diff, "plan_is_written", lambda lengths: True)
    pair = make(role)
    step_and_expect_equal(pair, 1)
    *_, name = fields.KPOOL_TOPK_PLAN[role != "draft-decode"].split(".")
    for backend, item in ((pair.ours, 3), (pair.theirs, 4)):
        for metadata in backend.metadata(1):
            owner = metadata if role == "draft-decode" else metadata.kpool_write_plan
            if not hasattr(owner, name):
                return
            plan = torch.tensor([[7, 1], [0, item]] + [[0, 0]] * 40, dtype=torch.int32)
            object.__setattr__(owner, name, plan)
    with pytest.raises(AssertionError, match="topk_v2_plan"):
        expect_equal(pair, 1)


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("last", [True, False, "neither"])
def test_the_schedule_of_sglang_is_recognised(last, name, state, monkeypatch):
    """As DeepGEMM makes it, by the formula of ``mqa_schedule``; here of 7 processors."""
    from sglang_nsa_plugin import dispatch
    from sglang_nsa_plugin.kernels.torch import schedule

    def deep_gemms(pool_seqlens, **page_size):
        assert list(page_size.values()) == [PAGE]
        made = schedule(pool_seqlens.long().clamp(min=1), 7, last is True).int()
        return made + 1 if last == "neither" else made

    monkeypatch.setattr(sglangs("kpool_plan"), "_compute_pool_schedule_metadata", deep_gemms)
    bind = dispatch.choose(name, CPU, with_kpool=True).bind_kpool
    expected = None if last == "neither" else last
    assert kpool.remainder_last(harness_backend().backend, bind) is expected


def captured_args(pair, bs):
    """A new capture of this batch size."""
    pair.fills().captured.pop(bs)
    pair.fills().record(pair.ours.capture_batch(bs))
    return pair.captured(bs).kpool_args
