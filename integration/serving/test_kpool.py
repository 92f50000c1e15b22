"""A model with a pooled index, filled in its graphs: same tokens and drafts, and who filled what.

    python -m integration.serving.serve_test kpool

It needs SGLang 0.5.20 or later and takes one GPU. All servers have the plugin of ``kpool_attention/``;
those without sglang-nsa-plugin have SGLang's own fused metadata. Replays of the second setup are all
shadow-checked.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.releases import differences
from integration.serving import checkpoint
from integration.serving.ab_servers import (
    ALL_ROLES_ENV,
    MANY,
    PROBE,
    ROLES,
    AbServers,
    Environment,
    Setup,
    python_path,
)
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    expect_alike_at_once,
    expect_alike_one_at_a_time,
    expect_every_role_filled,
    median_us_by_role,
    prompts,
    scheduler_figures,
)

POOL = 4  # tokens of an index key, as GLM-5.3-Flash has them
ATTENTION = Path(__file__).parent / "kpool_attention"
PATH = python_path(ATTENTION, PROBE)
FILLED: Environment = {**ALL_ROLES_ENV, "PYTHONPATH": PATH}
CHECKED: Environment = {**FILLED, "SGLANG_NSA_METADATA_CHECK": "1"}
SGLANG: Environment = {"SGLANG_PLUGINS": "probe,kpool_attention", "PYTHONPATH": PATH}
SETUPS = (
    Setup("kpool", MANY, {"plugin": FILLED, "sglang": SGLANG}),
    Setup("kpool-checked", MANY, {"plugin": CHECKED, "sglang": SGLANG}),
)
# Around multiples of the pool and of its pages, which have 64 pools.
LENGTHS = (*SHORT_LENGTHS, 61, 62, 66, 255, 256, 257, 1_021, 1_022, 1_023, 1_024)
SHARED = 300  # tokens of a beginning that is in the cache: more than a page


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instead of the model of the other slices."""
    if not differences.of(differences.HAS_POOLED_INDEX):
        pytest.skip("this SGLang serves no model with a pooled index")
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("kpool"), index_kpool=POOL)


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    """Also two that begin alike, the second with a prefix from the cache."""
    begin, *ends = prompts([SHARED, 40, 41], seed=161)
    asked = [*prompts(LENGTHS, seed=160), *(begin + end for end in ends)]
    expect_alike_one_at_a_time(servers, report, asked)


def test_many_at_once(servers: AbServers, report: Report) -> None:
    expect_alike_at_once(servers, report, (3, 7, 16), seed=160)


def test_record(servers: AbServers, report: Report) -> None:
    expect_every_role_filled(servers, report)


def test_the_host_needs_no_longer_than_with_sglangs_fused_kernels(servers: AbServers) -> None:
    """The times are those of the record; checked replays do more."""
    if servers.setup.name == "kpool-checked":
        pytest.skip("every replay is checked")
    us = {name: median_us_by_role(scheduler_figures(server)) for name, server in servers.items()}
    assert all(us["plugin"][role] <= us["sglang"][role] for role in ROLES), us
