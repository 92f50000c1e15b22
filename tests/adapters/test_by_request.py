"""Target-verify as SGLang plans it on SM100, on SGLang's real backend and CPU tensors.

SGLang is told that it is on CUDA and that the GPU is an SM100. So it lays out [requests, draft tokens]
context lengths, has DeepGEMM make their schedule, and fills by its own kernel of verify, which Triton's
interpreter runs. DeepGEMM is a stand-in here: its rule, unit of work by unit of work.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    CPU,
    expect_every_replay_to_be_checked,
    expect_the_error_to_be_found,
    make_pair,
    on_the_cpu,
    plant_error,
    random_batch,
    skip_unless_captured,
    step_and_expect_equal,
)
from test_switch import ask

from sglang_nsa_plugin import dispatch, options, self_test
from sglang_nsa_plugin.adapters import by_request, hooks, in_graph, mqa_schedule, supported, taken_over
from sglang_nsa_plugin.adapters.adapter import Request
from sglang_nsa_plugin.adapters.roles import DRAFT_DECODE_ROLE, DRAFT_EXTEND_ROLE, VERIFY_ROLE
from sglang_nsa_plugin.dispatch import BackendUnavailableError
from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
from sglang_nsa_plugin.state import VERIFY_STATE

pytestmark = on_the_cpu

PROCESSORS = 7
# Where releases have SGLang's kernel of verify, newest first.
KERNELS = (
    "sglang.kernels.ops.attention.dsa.metadata",
    "sglang.kernels.ops.attention.dsa_metadata",
    "sglang.srt.layers.attention.triton_ops.dsa_metadata",
)
MANAGER = "sglang.srt.layers.attention.dsa.dsa_metadata_manager"


def deep_gemms(lengths: torch.Tensor, block: int, processors: int) -> torch.Tensor:
    """DeepGEMM's rule on SM100: ``lengths`` [requests, n], of which it reads the last column.

    Requests in order, and in each its segments of 256 tokens in order, are given to n tokens each. The
    first processors get one of these units more. Each begins at the request and segment of its first.
    """
    requests, n = lengths.shape
    units = [
        (r * n, segment)
        for r, length in enumerate(lengths[:, -1].tolist())
        for segment in range(-(-length // 256))
        for _ in range(n)
    ]
    return deal([*units, (requests * n, 0)], processors)


def deep_gemms_by_pairs(lengths: torch.Tensor, block: int, processors: int) -> torch.Tensor:
    """Its rule before 0.1.4: segments of one pair of tokens after the other, rows that are pairs."""
    requests, n = lengths.shape
    pairs = -(-n // 2)
    units = [
        (r * pairs + pair, segment)
        for r, length in enumerate(lengths[:, -1].tolist())
        for pair in range(pairs)
        for segment in range(-(-length // 256))
    ]
    return deal([*units, (requests * pairs, 0)], processors)


def deal(units: list[tuple[int, int]], processors: int) -> torch.Tensor:
    """Where each processor begins in these units of work; the last one stands for the end."""
    share, longer = divmod(len(units) - 1, processors)
    shares = [share + (p < longer) for p in range(processors)]
    starts = itertools.accumulate(shares, initial=0)
    return torch.tensor([units[start] for start in starts], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _needs_graphs_of_verify():
    skip_unless_captured(VERIFY_ROLE.name)


@pytest.fixture
def sm100(state, monkeypatch):
    """SGLang on an SM100, whose DeepGEMM is the rule above."""
    module = importlib.import_module("sglang.srt.layers.attention.dsa_backend")
    monkeypatch.setattr(module, "is_cuda", lambda: True)
    name, (kernels, *others) = "fused_dsa_target_verify_metadata", _modules_with_the_kernel()
    launcher = process_stubs.on_cpu(getattr(kernels, name))
    for each in (kernels, *others):
        monkeypatch.setattr(each, name, launcher)
    use_deep_gemm(deep_gemms, monkeypatch)
    with contextlib.ExitStack() as stack:
        if hasattr(module, "is_sm100_supported"):
            monkeypatch.setattr(module, "is_sm100_supported", lambda: True)
        else:  # since 0.5.20
            from sglang.srt.runtime_context import override_platform

            stack.enter_context(override_platform(is_sm100=True))
        yield


def _modules_with_the_kernel():
    """The one that has SGLang's kernel of verify, and the one that imports its name, since 0.5.20."""
    name = "fused_dsa_target_verify_metadata"
    found = [module for module in map(_module, (*KERNELS, MANAGER)) if hasattr(module, name)]
    if not found or found[0].__name__ == MANAGER:
        pytest.skip("this SGLang has no fused kernel of verify; 0.5.15 and later have")
    return found


def _module(name):
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    return None


def use_deep_gemm(rule, monkeypatch):
    deep_gemm = SimpleNamespace(get_paged_mqa_logits_metadata=rule, get_num_sms=lambda: PROCESSORS)
    module = importlib.import_module("sglang.srt.layers.attention.dsa_backend")
    monkeypatch.setattr(module, "deep_gemm", deep_gemm, raising=False)
    for name, stand_in in {  # since 0.5.22
        "resolve_paged_mqa_logits_metadata_fn": lambda: rule,
        "resolve_num_sms": lambda: PROCESSORS,
    }.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, stand_in)


def make_verify(backend: str = "auto", **harness: object):
    return make_pair(backend, role="verify", **harness)


@pytest.mark.parametrize(
    ("draft_tokens", "backend"), [*((n, "auto") for n in range(2, 8)), (3, "torch"), (4, "torch")]
)
def test_every_value_equals_sglangs(sm100, draft_tokens, backend):
    pair = make_verify(backend, draft_tokens=draft_tokens, context_len=800)
    generator = torch.Generator().manual_seed(draft_tokens)
    for _ in range(4):
        bs = random_batch(pair, generator)
        for metadata in (pair.metadata(bs), pair.theirs.metadata(bs)[0]):
            metadata.paged_mqa_schedule_metadata.fill_(self_test.POISON)
        result = step_and_expect_equal(pair, bs)
        metadata = pair.metadata(bs)
        assert metadata.paged_mqa_ctx_lens_2d.shape == (bs, draft_tokens)
        lengths = (pair.inputs.seq_lens[:bs] + draft_tokens).tolist()
        assert metadata.paged_mqa_ctx_lens_2d.tolist() == [[L] * draft_tokens for L in lengths]
        assert result.compared["ctx_lens"] == bs * draft_tokens
        assert result.compared["paged_mqa_schedule_metadata"] == 2 * (PROCESSORS + 1)
    assert set(pair.fills().captured) == set(BATCH_SIZES)
    assert (VERIFY_STATE.replays, VERIFY_STATE.fallbacks) == (4, {})
    assert VERIFY_STATE.mqa_schedule == ("cpu" if backend == "auto" else "torch")


def test_one_draft_token_is_a_row(sm100):
    pair = make_verify(draft_tokens=1)
    assert pair.fills().columns == 1
    assert pair.metadata(2).paged_mqa_ctx_lens_2d.shape == (2, 1)


def test_the_log_says_that_it_is_untried(sm100, caplog):
    caplog.set_level(logging.WARNING)
    make_verify()
    (said,) = [message for message in caplog.messages if "untried" in message]
    assert "verify: context lengths of [requests, 4] are untried on a GPU." in said
    assert "start with --nsa-metadata-check 1" in said


def test_by_rows_nothing_is_said(state, caplog):
    caplog.set_level(logging.WARNING)
    pair = make_verify()
    assert pair.fills().columns == 1
    assert "untried" not in caplog.text


# --- what stays with SGLang ---


def test_by_default_sglang_fills_and_the_log_says_what_to_set(sm100, caplog):
    caplog.set_level(logging.INFO)
    process_stubs.activate_plugin("auto", 0, "verify")
    taken_over.TAKEOVERS["verify"].arm(Request("auto", 0, is_named=False))
    one = GraphBackend(CPU, role="verify")
    assert taken_over.ATTRIBUTE not in vars(one.backend)
    assert VERIFY_STATE.reason == (
        "on this GPU verify needs context lengths of [requests, 4], and no such GPU has been tried. To "
        "fill them all the same, start with --nsa-metadata-roles draft-extend,draft-decode,verify"
    )
    assert f"not used: {VERIFY_STATE.reason}; SGLang fills verify metadata itself" in caplog.text


def test_a_backend_that_stays_with_sglang_takes_the_others_of_its_role_along(sm100):
    """Adaptive speculation has one without a step, whose verify goes by rows: one outcome for all."""
    filled = make_verify(draft_tokens=1)
    taken_over.TAKEOVERS["verify"].arm(Request("auto", 0, is_named=False))
    GraphBackend(CPU, role="verify")
    assert taken_over.TAKEOVERS["verify"].backends == []
    assert taken_over.ATTRIBUTE not in vars(filled.ours.backend)
    assert VERIFY_STATE.reason.startswith("on this GPU verify needs context lengths of [requests, 4]")
    assert taken_over.RETIRED in vars(filled.ours.backend)  # switched off in its graphs


def test_a_backend_without_a_draft_step_leaves_the_others_filled(state):
    filled = make_pair(role="draft-decode")
    takeover = taken_over.TAKEOVERS["draft-decode"]
    takeover.arm(Request("auto", 0))
    none = SimpleNamespace(attn_backends=[])
    taken_over.consider(none, none, None, DRAFT_DECODE_ROLE, supported.why_draft_decode_unsupported)
    assert takeover.backends == [filled.ours.backend]
    assert takeover.outcome.why_not_switchable(False) is None


def test_the_roles_that_the_log_names_are_all_of_them():
    text = by_request.why_not_named(
        SimpleNamespace(
            speculative_num_draft_tokens=3,
            req_to_token=torch.zeros(1),
            _build_paged_mqa_schedule_2d_ctx_lens=lambda **given: torch.zeros(1, 3),
        ),
        VERIFY_ROLE,
        is_named=False,
    )
    assert text is not None
    assert set(text.rsplit(" ", 1)[1].split(",")) == set(options.ROLES)


@pytest.mark.parametrize("rule", [deep_gemms_by_pairs, lambda *given: deep_gemms(*given) + 1])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_another_schedule_than_deep_gemms_leaves_verify_to_sglang(sm100, rule, backend, monkeypatch):
    use_deep_gemm(rule, monkeypatch)
    process_stubs.activate_plugin(backend, 0, "verify")
    by_name = pytest.raises(BackendUnavailableError) if backend == "torch" else contextlib.nullcontext()
    with by_name as ended:
        one = GraphBackend(CPU, role="verify")
        assert taken_over.ATTRIBUTE not in vars(one.backend)
    said = str(ended.value) if ended else VERIFY_STATE.reason
    name = "torch" if backend == "torch" else "cpu"
    assert f"[requests, 4]: {name} makes another schedule of them than DeepGEMM does here" in said


def test_the_last_processors_may_take_the_remainder(sm100, monkeypatch):
    """As DeepGEMM has it on SM90 since 0.1.4: the probe finds out, it is not told."""

    def last(lengths, block, processors):
        schedule = deep_gemms(lengths, block, processors)
        share, longer = divmod(int(((lengths[:, -1] + 255) // 256).sum()) * lengths.shape[1], processors)
        units = deep_gemms(lengths, block, max(share * processors + longer, 1))  # one unit each
        starts = [p * share + max(p - processors + longer, 0) for p in range(processors + 1)]
        return units[starts] if share + longer else schedule

    use_deep_gemm(last, monkeypatch)
    pair = make_verify()
    assert pair.fills().remainder_last is True
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        step_and_expect_equal(pair, random_batch(pair, generator))


def test_an_implementation_that_is_wrong_by_request_leaves_verify_to_sglang(sm100, monkeypatch):
    monkeypatch.setattr(dispatch, "why_wrong_by_request", lambda name, device: f"{name} is wrong")
    process_stubs.activate_plugin("auto", 0, "verify")
    one = GraphBackend(CPU, role="verify")
    assert taken_over.ATTRIBUTE not in vars(one.backend)
    assert "context lengths of [requests, 4]: cpu: cpu is wrong" in VERIFY_STATE.reason


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_the_self_test_by_request_passes(name):
    assert dispatch.why_wrong_by_request(name, CPU) is None


def test_the_self_test_by_request_finds_a_fill_by_rows():
    def by_rows(args):
        lengths = args.ctx_lens

        def run() -> None:
            dispatch._bind_of("torch")(args)()
            lengths[:, 0] = args.seqlens_expanded[:: lengths.shape[1]]

        return run

    why_not = self_test.why_failed(by_rows, CPU, (), by_request=True)
    assert why_not == "its self-test filled ctx_lens with other values than the torch reference"
    assert self_test.why_failed(dispatch._bind_of("torch"), CPU, ()) is None


def test_another_layout_at_capture_is_refused(sm100):
    pair = make_verify()
    metadata = pair.metadata(2)
    object.__setattr__(metadata, "paged_mqa_ctx_lens_2d", torch.zeros(8, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"paged_mqa_ctx_lens_2d: must be \[2, 4\], .* got \[8, 1\]"):
        pair.fills()._args(pair.ours.capture_batch(2), metadata)


def test_other_plans_go_by_rows(sm100):
    pair = make_verify()
    for role in (DRAFT_EXTEND_ROLE, DRAFT_DECODE_ROLE):
        assert by_request.columns_of(pair.ours.backend, role) == 1


def test_a_release_that_lays_lengths_out_in_another_way_does_not_fit_verify():
    (needed,) = [
        need for need in in_graph.ADAPTER.parts_of("verify").needs if "2d_ctx_lens" in need.target
    ]
    assert not hooks.misfits([needed])


def test_without_a_gpu_a_schedule_by_rows_is_not_asked_for(sm100):
    pair = make_verify()
    assert mqa_schedule.remainder_last(pair.ours.backend, pair.fills().bind) is None


# --- in service ---


def test_switched_off_sglang_fills_the_same_tensors(sm100):
    pair = make_verify()
    generator = torch.Generator().manual_seed(5)
    step_and_expect_equal(pair, random_batch(pair, generator))
    assert ask(nsa_metadata_verify=0)
    step_and_expect_equal(pair, random_batch(pair, generator))
    assert ask(nsa_metadata_verify=1)
    step_and_expect_equal(pair, random_batch(pair, generator))
    assert VERIFY_STATE.replays == 2


def test_every_replay_is_checked_and_equal(sm100):
    pair = make_verify(check_every=1, context_len=300)
    expect_every_replay_to_be_checked(pair, least_values=17 * 100)


@pytest.mark.parametrize("field", ["paged_mqa_ctx_lens_2d", "paged_mqa_schedule_metadata"])
def test_the_check_finds_a_planted_error(field, sm100, monkeypatch, caplog):
    plant_error(field, monkeypatch)
    expect_the_error_to_be_found(make_verify(check_every=1, context_len=300), field, caplog)
