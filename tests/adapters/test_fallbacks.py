"""Steps that go to SGLang's own fill: each is counted, the first of each reason is logged."""

from __future__ import annotations

import logging

from sglang_nsa_plugin.adapters.fallbacks import FallbackReason, count_fallback


def test_each_step_is_counted_and_the_first_of_each_reason_is_logged(state, caplog):
    caplog.set_level(logging.WARNING, "sglang.nsa_plugin")
    for reason in (FallbackReason.NO_REQUESTS, FallbackReason.NO_REQUESTS, FallbackReason.OTHER_SIZES):
        count_fallback(reason)
    assert state.fallbacks == {
        "the batch has no requests": 2,
        "the batch's tensors have other sizes than its number of requests": 1,
    }
    assert [record.getMessage() for record in caplog.records] == [
        f"sglang-nsa-plugin: SGLang filled this draft-extend step: {reason}. Further ones are counted, "
        "not logged"
        for reason in state.fallbacks
    ]
