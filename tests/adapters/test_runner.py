"""SGLang's own draft-extend runner and scheduler barrier around a taken-over backend, on CPU tensors.

The runner's ``execute`` is the installed release's; what it replays is run again, as in test_in_graph.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cpu_pair import BATCH_SIZES, DRAFT_TOKENS, make_pair, on_the_cpu

from sglang_nsa_plugin.adapters.no_op import LAST_DRAFT_EXTEND

pytestmark = on_the_cpu


class Batch(SimpleNamespace):
    """What a release reads from a batch and this one does not have is None there, too."""

    def __getattr__(self, name: str) -> None:
        return None


@pytest.fixture
def pair():
    pair = make_pair()
    for captured in pair.fills().captured.values():
        captured.read_done = mock.Mock()  # an event, on a GPU
    return pair


@pytest.fixture
def runner(pair):
    return make_runner(pair)


def make_runner(pair):
    """SGLang's runner as its constructor leaves it, with the pair's backend, buffers and replays."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as module

    model_runner = pair.ours.model_runner
    model_runner.device_timer = None
    model_runner.model_config.model_is_mrope = False
    rename_fence(model_runner, module.EAGLEDraftExtendCudaGraphRunner)
    runner = object.__new__(module.EAGLEDraftExtendCudaGraphRunner)
    vars(runner).update(
        deepep_adapter=mock.Mock(),
        device_module=mock.Mock(),
        require_gathered_buffer=False,
        require_mlp_tp_gather=False,
        capture_bs=list(BATCH_SIZES),
        captured_req_width=DRAFT_TOKENS,
        num_tokens_per_bs=DRAFT_TOKENS,  # the same in 0.5.15
        seq_len_fill_value=1,
        extend_seq_lens_cpu=[DRAFT_TOKENS] * BATCH_SIZES[-1],
        forward_mode=ForwardMode.DRAFT_EXTEND_V2,
        draft_extend_attn_backend=pair.ours.backend,
        model_runner=model_runner,
        buffers=buffers(pair.inputs),
        _replay_graph=lambda key, batch: replay(pair, runner.bs),
    )
    return runner


def rename_fence(model_runner, runner_class):
    """Leaves the one attribute that this release's runner publishes its event in."""
    from sglang_nsa_plugin.adapters.supported import FENCE_EVENTS

    (name,) = set(FENCE_EVENTS).intersection(inspect.unwrap(runner_class.execute).__code__.co_names)
    for other in FENCE_EVENTS:
        vars(model_runner).pop(other, None)
    setattr(model_runner, name, None)


def buffers(inputs) -> Batch:
    tokens = inputs.max_bs * DRAFT_TOKENS
    long = {name: torch.zeros(tokens, dtype=torch.int64) for name in ("input_ids", "positions")}
    per_request = ("extend_seq_lens", "num_correct_drafts", "num_accept_tokens")
    return Batch(
        seq_lens=inputs.seq_lens,
        req_pool_indices=inputs.req_pool_indices,
        seq_lens_cpu=torch.ones(inputs.max_bs, dtype=torch.int64),
        out_cache_loc=torch.zeros(tokens, dtype=torch.int64),
        select_index=torch.zeros(inputs.max_bs, dtype=torch.int64),
        **long,
        **{name: torch.zeros(inputs.max_bs, dtype=torch.int32) for name in per_request},
    )


def replay(pair, bs):
    pair.replay_graph(bs)
    rows = torch.zeros(bs * DRAFT_TOKENS, 2)
    return SimpleNamespace(next_token_logits=rows, hidden_states=rows)


def execute(pair, runner, generator, raw_bs):
    """One draft-extend step of raw_bs random requests, with the arguments that this release passes."""
    from sglang_nsa_plugin.harness.inputs import random_step

    width = pair.inputs.req_to_token.shape[1]
    random_step(pair.inputs, generator, raw_bs, raw_bs, DRAFT_TOKENS, width)
    tokens = torch.zeros(raw_bs * DRAFT_TOKENS, dtype=torch.int64)
    batch = Batch(
        batch_size=raw_bs,
        input_ids=tokens,
        positions=tokens,
        out_cache_loc=tokens,
        seq_lens=pair.inputs.seq_lens[:raw_bs].clone(),
        req_pool_indices=pair.inputs.req_pool_indices[:raw_bs].clone(),
        spec_info=Batch(),
    )
    arguments = [batch]
    if "select_index" in inspect.signature(type(runner).execute).parameters:
        arguments.append(torch.arange(raw_bs) * DRAFT_TOKENS)
    with pair.stub_process():
        return runner.execute(*arguments)


def wait_of_the_scheduler(model_runner):
    """What SGLang's scheduler waits on before it writes req_to_token again."""
    from sglang.srt.managers.scheduler import Scheduler

    stream = mock.Mock()
    worker = SimpleNamespace(last_shared_read_runner=model_runner, war_fastpath_runner=model_runner)
    Scheduler._apply_war_barrier(
        SimpleNamespace(
            _war_barrier_enabled=True,
            model_worker=worker,
            schedule_stream=stream,
            forward_stream="the whole forward",
        )
    )
    ((_, (waited_on,), _),) = stream.method_calls
    return waited_on


def test_every_value_equals_sglangs_fill_behind_the_runner(pair, runner):
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured
    from sglang_nsa_plugin.state import STATE

    generator = torch.Generator().manual_seed(1)
    result, replays = Diff(), STATE.replays
    for raw_bs in (1, 2, 3, 4, 5, 8, 3):
        output = execute(pair, runner, generator, raw_bs)
        pair.theirs.sglang_fill(runner.bs)
        ours, theirs = (
            r.backend.decode_cuda_graph_metadata[runner.bs] for r in (pair.ours, pair.theirs)
        )
        compare_captured(ours, theirs, result)
        assert output.next_token_logits.shape[0] in (raw_bs, raw_bs * DRAFT_TOKENS)
    assert result.first is None, result.first
    assert STATE.replays - replays == 7


def test_the_scheduler_waits_for_the_read_inside_the_replay(pair, runner):
    """Behind the fill and not before the replay; and once: the next wait has no event."""
    execute(pair, runner, torch.Generator().manual_seed(2), raw_bs=3)
    assert wait_of_the_scheduler(runner.model_runner) is pair.captured(4).read_done
    assert wait_of_the_scheduler(runner.model_runner) == "the whole forward"


def test_the_empty_kernel_queries_the_same_event(pair, runner):
    """None once SGLang fills, whose graph records no such event."""
    from sglang_nsa_plugin.adapters import taken_over

    execute(pair, runner, torch.Generator().manual_seed(4), raw_bs=3)
    assert LAST_DRAFT_EXTEND.fill_done is pair.captured(4).read_done
    taken_over.hand_back(pair.ours.backend)
    execute(pair, runner, torch.Generator().manual_seed(5), raw_bs=3)
    assert LAST_DRAFT_EXTEND.fill_done is None


def test_the_scheduler_waits_for_the_whole_forward_when_the_canary_reads(pair, runner):
    runner.model_runner.canary_manager = mock.MagicMock()
    execute(pair, runner, torch.Generator().manual_seed(3), raw_bs=3)
    assert wait_of_the_scheduler(runner.model_runner) == "the whole forward"


def test_a_backend_that_was_not_taken_over_keeps_sglangs_fence(pair, runner):
    from sglang_nsa_plugin.adapters import taken_over

    taken_over.hand_back(pair.ours.backend)
    sglangs = runner.device_module.Event.return_value
    execute(pair, runner, torch.Generator().manual_seed(4), raw_bs=2)
    assert wait_of_the_scheduler(runner.model_runner) in (sglangs, "the whole forward")
