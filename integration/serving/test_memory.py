"""Memory given back and taken again, and new weights, under captured graphs: both arms alike."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from integration.serving import checkpoint
from integration.serving.ab_servers import MANY, Arms, Fleet, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    check_record,
    gpu_memory_mib,
    mismatches,
    needs_graphs,
    one_at_a_time,
    prompts,
    summary,
)
from integration.serving.server import Server, ServerError

SETUPS = (Setup("memory", (*MANY, "--enable-memory-saver")),)
LIMIT_S = 60.0
REFUSAL = "RuntimeError: This should not happen"
IDLE_S = 1.0  # memory is only given back by a server without a request
ASKED = prompts(SHORT_LENGTHS, seed=71)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same configuration with other weights."""
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


def test_cache_released_and_resumed(arms: Arms, fleet: Fleet, report: Report) -> None:
    before = one_at_a_time(arms, ASKED)
    memory = release_and_resume(arms, ["kv_cache"])
    after = one_at_a_time(arms, ASKED)
    report("memory.cache", {"gpu_mib": memory, "before": summary(before), "after": summary(after)})
    assert mismatches(before) == []
    assert mismatches(after) == []
    # other servers that start meanwhile take memory of the same GPU
    assert memory["released"] < memory["before"] or not fleet.alone(arms.setup)


def test_all_released_and_weights_loaded_again(
    arms: Arms, fleet: Fleet, model: Path, report: Report
) -> None:
    """Weights are lost when their memory is given back, and read from disk again, as in training."""
    memory = release_and_resume(arms, None)
    loaded = {name: load_weights(arm.server, model) for name, arm in arms.items()}
    after = one_at_a_time(arms, ASKED)
    report("memory.all", {"gpu_mib": memory, "loaded": loaded, "after": summary(after)})
    assert mismatches(after) == []
    # other servers that start meanwhile take memory of the same GPU
    assert memory["released"] < memory["before"] or not fleet.alone(arms.setup)


def test_other_weights(arms: Arms, model: Path, other_model: Path, report: Report) -> None:
    """Other weights give other tokens, the first ones the first tokens again."""
    target = arms["sglang"].server
    first = [target.generate(prompt, 16).output_ids for prompt in ASKED]
    loaded = {name: load_weights(arm.server, other_model) for name, arm in arms.items()}
    # both before one alone: a prompt whose beginning is cached is computed with other roundings
    rows = one_at_a_time(arms, ASKED)
    others = [target.generate(prompt, 16).output_ids for prompt in ASKED]
    for arm in arms.values():
        load_weights(arm.server, model)
    back = one_at_a_time(arms, ASKED)
    report("memory.other_weights", {"loaded": loaded, "others": summary(rows), "back": summary(back)})
    assert others != first
    assert mismatches(rows) == []
    assert mismatches(back) == []
    assert [target.generate(prompt, 16).output_ids for prompt in ASKED] == first


def test_record(arms: Arms, report: Report) -> None:
    check_record(arms, report)


def test_recapture_ends_as_without_the_plugin(arms: Arms, model: Path, report: Report) -> None:
    """Asked to capture its graphs anew, SGLang 0.5.17 captures a decode graph of the draft model, too,
    which its runner refuses for EAGLE: the server ends. Both arms do the same; the last test, therefore.
    """
    needs_graphs(arms)
    outcomes: dict[str, Any] = {}
    for name, arm in arms.items():
        try:
            outcomes[name] = load_weights(arm.server, model, recapture_cuda_graph=True)
        except ServerError:
            outcomes[name] = "ended"
    refused = {name: REFUSAL in arm.server.log() for name, arm in arms.items()}
    rows = one_at_a_time(arms, ASKED) if "ended" not in outcomes.values() else []
    report("memory.recapture", {"outcomes": outcomes, "refused": refused, "after": summary(rows)})
    assert outcomes["plugin"] == outcomes["sglang"]
    assert refused["plugin"] == refused["sglang"]
    assert mismatches(rows) == []


def release_and_resume(arms: Arms, tags: list[str] | None) -> dict[str, int]:
    """GPU memory in MiB of both arms together: before, while it is given back, and after."""
    time.sleep(IDLE_S)
    body = {} if tags is None else {"tags": tags}
    used = [gpu_memory_mib()[0]]
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        for arm in arms.values():
            arm.server.request("POST", path, LIMIT_S, json=body)
        used.append(gpu_memory_mib()[0])
    return dict(zip(("before", "released", "resumed"), used, strict=True))


def load_weights(target: Server, model: Path, **more: Any) -> str:
    """SGLang's message."""
    body = {"model_path": str(model), **more}
    return str(target.request("POST", "/update_weights_from_disk", LIMIT_S, json=body)["message"])
