"""Errors while a fill is set up: SGLang fills every batch size, or the start ends with the reason.

On CPU tensors what a graph would hold is run again; in real captures: gpu/test_gpu_in_graph.py.
"""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    make_pair,
    on_the_cpu,
    random_batch,
    skip_unless_captured,
    step_and_expect_equal,
)

from sglang_nsa_plugin.adapters import taken_over
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.dispatch import BackendUnavailableError
from sglang_nsa_plugin.state import ALL_ROLES, STATES

pytestmark = on_the_cpu

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
LAST = BATCH_SIZES[-1]


def fail_in_bind(patch, error):
    from sglang_nsa_plugin import dispatch

    choose = dispatch.choose  # whose choices are kept for the life of the process

    def chosen(*asked, **more):
        choice = choose(*asked, **more)

        def failing(args):
            if args.bs == LAST:
                raise error
            return choice.bind(args)

        return dataclasses.replace(choice, bind=failing)

    patch.setattr(dispatch, "choose", chosen)


def fail_in_first_run(patch, error):
    from sglang_nsa_plugin.adapters.captured_fill import BackendFills

    refresh_derived = BackendFills.refresh_derived

    def failing(fill, metadata):
        if metadata.cache_seqlens_int32.shape[0] == LAST:
            raise error
        refresh_derived(fill, metadata)

    patch.setattr(BackendFills, "refresh_derived", failing)


def fail_in_shadow_copies(patch, error):
    from sglang_nsa_plugin.adapters.shadow_check import ShadowedReplays

    prepare = ShadowedReplays.prepare

    def failing(checked, bs, metadata):
        if bs == LAST:
            raise error
        prepare(checked, bs, metadata)

    patch.setattr(ShadowedReplays, "prepare", failing)


FAILING = [
    (fail_in_bind, OUT_OF_MEMORY),
    (fail_in_bind, ValueError("page_table_1: must have 4 rows, got 3")),
    (fail_in_bind, TypeError("seq_lens: must be a torch.Tensor, got NoneType")),
    (fail_in_first_run, RuntimeError("no kernel image is available for execution on the device")),
    (fail_in_shadow_copies, OUT_OF_MEMORY),
]


@pytest.mark.parametrize("role", ALL_ROLES)
@pytest.mark.parametrize(("fail", "error"), FAILING)
def test_an_error_while_a_fill_is_set_up_leaves_every_batch_size_to_sglang(
    fail, error, role, state, monkeypatch, caplog
):
    """Also those whose graphs hold our fill already: it is switched off for good."""
    from sglang_nsa_plugin.state import record

    fail(monkeypatch, error)
    with caplog.at_level(logging.INFO, logger="sglang.nsa_plugin"):
        pair = make_pair(check_every=1, role=role)
    backend = pair.ours.backend
    assert not hasattr(backend, taken_over.ATTRIBUTE)
    said = [line for line in lines_of(caplog) if "not used" in line and f" {role} " in line]
    assert len(said) == 1
    reason = f"the fill could not be set up: {type(error).__name__}: {error}"
    assert f"not used: {reason}; SGLang fills {role} metadata itself" in said[0]
    found = record()["roles"][role]
    assert (found["adapter"], found["backend"], found["reason"]) == (None, None, reason)
    assert not found["in_graph"]

    captured = getattr(backend, taken_over.RETIRED).captured
    assert set(captured) >= set(BATCH_SIZES) - {LAST}
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        serve_and_expect_sglangs_values(pair, captured, random_batch(pair, generator))
    of_role = STATES[role]
    assert (of_role.replays, of_role.checks, dict(of_role.fallbacks)) == (0, 0, {})


def lines_of(caplog) -> list[str]:
    return [line.getMessage() for line in caplog.records]


def serve_and_expect_sglangs_values(pair, captured, bs):
    """One step as the runner does it, with a graph that holds the fill where one was recorded."""
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured

    pair.ours.replay(bs)
    kept = pair.inputs.seq_lens.clone()
    pair.inputs.seq_lens.fill_(7)  # what a fill that still ran would read
    if bs in captured:
        captured[bs].run()
    pair.inputs.seq_lens.copy_(kept)
    pair.theirs.sglang_fill(bs)
    result = Diff()
    for ours, theirs in zip(pair.ours.metadata(bs), pair.theirs.metadata(bs), strict=True):
        compare_captured(ours, theirs, result)
    assert result.first is None, result.first
    for step, metadata in zip(pair.ours.steps(), pair.ours.metadata(bs), strict=True):
        assert step.forward_metadata is metadata


@pytest.mark.parametrize("role", ALL_ROLES)
@pytest.mark.parametrize(("fail", "error"), FAILING)
def test_the_same_error_ends_a_start_that_asked_by_name(fail, error, role, state, monkeypatch):
    fail(monkeypatch, error)
    with pytest.raises(BackendUnavailableError) as ended:
        make_pair("torch", check_every=1, role=role)
    assert "--nsa-metadata-backend torch was asked for by name and cannot be used" in str(ended.value)
    assert f"{type(error).__name__}: {error}" in str(ended.value)


@pytest.mark.parametrize("role", ALL_ROLES)
@pytest.mark.parametrize("error", [OUT_OF_MEMORY, BackendUnavailableError("torch cannot run here")])
def test_the_same_error_in_service_leaves_the_role_to_sglang(error, role, state, monkeypatch):
    """Adaptive speculation makes backends in service; by then no error may leave the hook."""
    make_pair("torch", role=role)
    OUTCOMES[role].report_in_place()
    fail_in_first_run(monkeypatch, error)
    pair = make_pair("torch", role=role)
    assert not STATES[role].in_place
    assert type(error).__name__ in STATES[role].reason
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        serve_and_expect_sglangs_values(pair, {}, random_batch(pair, generator))


def captured_again_in_service(role, check_every):
    """A pair whose server is in service, and whose backend SGLang captures again; our former fills."""
    pair = make_pair("torch", role=role, check_every=check_every)
    fills = pair.fills()
    OUTCOMES[role].report_in_place()
    step_and_expect_equal(pair, random_batch(pair, torch.Generator().manual_seed(6)))
    pair.ours.init_state()
    for bs in BATCH_SIZES:
        pair.ours.capture_setup(bs)
        pair.ours.backend.init_forward_metadata_in_graph(pair.ours.capture_batch(bs))
    return pair, fills


@pytest.mark.parametrize("check_every", [0, 1])
@pytest.mark.parametrize("role", ALL_ROLES)
def test_graphs_that_are_captured_again_in_service_are_sglangs(role, check_every, state):
    """The weights were updated with ``recapture_cuda_graph``. Fills in old graphs are off."""
    pair, fills = captured_again_in_service(role, check_every)
    assert STATES[role].reason == taken_over.CAPTURED_AGAIN
    assert (STATES[role].in_place, int(fills.enabled), fills.captured) == (False, 0, {})
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        serve_and_expect_sglangs_values(pair, {}, random_batch(pair, generator))
    assert STATES[role].replays == 1


@pytest.mark.parametrize("role", ALL_ROLES)
def test_a_fill_that_cannot_be_switched_off_then_ends_the_process(role, state, monkeypatch):
    def broken(fills):
        raise RuntimeError("planted: the device is lost")

    skip_unless_captured(role)
    monkeypatch.setattr("sglang_nsa_plugin.adapters.captured_fill.BackendFills.retire", broken)
    with pytest.raises(RuntimeError, match="the device is lost"):
        captured_again_in_service(role, check_every=0)


@pytest.mark.parametrize("role", ALL_ROLES)
@pytest.mark.parametrize("step", ["dispatch.choose", "BackendFills"])
def test_a_backend_without_memory_for_its_self_test_or_switch_stays_with_sglang(
    step, role, state, monkeypatch
):
    def no_memory(*_, **__):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(f"sglang_nsa_plugin.adapters.taken_over.{step}", no_memory)
    with pytest.raises(RuntimeError, match=r"did not take over .*: the fill could not be set up: OutOf"):
        make_pair(role=role).replay(1)


@pytest.mark.parametrize("role", ALL_ROLES)
def test_a_shadow_check_without_its_library_leaves_the_backend_to_sglang(role, state, monkeypatch):
    """A server's command line refuses it; an engine made from Python comes here."""
    from sglang_nsa_plugin.kernels import cpu

    monkeypatch.setattr(cpu, "why_unavailable", lambda: "the library was built without CUDA")
    with pytest.raises(RuntimeError, match=r": the shadow check cannot run: the library was built"):
        make_pair("torch", check_every=1, role=role)
    with pytest.raises(
        RuntimeError, match=r"did not take over .*: the shadow check cannot run: the lib"
    ):
        make_pair(check_every=1, role=role).replay(1)


@pytest.mark.parametrize("role", ALL_ROLES)
def test_one_backend_that_fails_hands_back_the_others(role, state, monkeypatch):
    """Adaptive speculation has several backends: the record speaks for all of them."""
    from sglang_nsa_plugin.adapters import taken_over

    first = make_pair(role=role)
    fail_in_bind(monkeypatch, OUT_OF_MEMORY)
    second = make_pair(role=role)
    for pair in (first, second):
        assert not hasattr(pair.ours.backend, taken_over.ATTRIBUTE)
        serve_and_expect_sglangs_values(pair, getattr(pair.ours.backend, taken_over.RETIRED).captured, 2)


def test_an_error_of_the_program_is_not_stepped_aside_from(state, monkeypatch):
    fail_in_bind(monkeypatch, AttributeError("a typing error"))
    with pytest.raises(AttributeError, match="a typing error"):
        make_pair()


@pytest.mark.parametrize("role", ALL_ROLES)
def test_an_error_inside_sglangs_capture_ends_the_start_with_advice(role, state, monkeypatch):
    """The capture is broken by then, and no other fill could go on with it."""
    from sglang_nsa_plugin.adapters import taken_over
    from sglang_nsa_plugin.adapters.captured_fill import CaptureError

    monkeypatch.setattr(taken_over, "is_capturing", lambda: True)
    fail_in_bind(monkeypatch, OUT_OF_MEMORY)
    with pytest.raises(CaptureError) as ended:
        make_pair(role=role)
    assert str(ended.value) == (
        f"the {role} fill of batch size 8 failed inside SGLang's capture: OutOfMemoryError: "
        "CUDA out of memory. Tried to allocate 20.00 MiB. Start with --nsa-metadata-backend off to "
        "serve with SGLang's own fill"
    )
