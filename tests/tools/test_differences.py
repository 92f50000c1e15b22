"""What differs between SGLang releases for whoever starts a server."""

from __future__ import annotations

import pytest

from integration.releases import differences, matrix
from integration.releases.differences import HAS_POOLED_INDEX
from integration.serving.ab_servers import serve_args


@pytest.mark.parametrize(
    ("release", "expected", "absent"),
    [
        (
            "0.5.12.post1",
            ["--nsa-decode-backend", "--disable-piecewise-cuda-graph", "--cuda-graph-max-bs"],
            "--dsa",
        ),
        ("0.5.13.post1", ["--dsa-decode-backend", "--disable-piecewise-cuda-graph"], "--nsa"),
        ("0.5.14", ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode"], "--nsa"),
        ("0.5.23", ["--dsa-decode-backend", "--cuda-graph-max-bs-decode"], "--nsa"),
    ],
)
def test_options_are_spelled_as_the_release_spells_them(monkeypatch, release, expected, absent):
    monkeypatch.setattr(differences, "version", lambda name: release)
    options = serve_args()
    assert set(expected) <= set(options)
    assert not any(option.startswith(absent) for option in options)


@pytest.mark.parametrize("release", [*matrix.tested_releases(), "0.6.0"])
def test_every_release_and_those_to_come_have_each_of_them(release):
    tables = [value for value in vars(differences).values() if isinstance(value, tuple)]
    assert len(tables) == 8
    for table in tables:
        assert differences.of(table, release) not in (None, "", ())


def test_data_parallel_attention_has_one_option_since_0_5_22():
    spelled = {
        release: differences.data_parallel_attention(2, release)
        for release in ("0.5.17", "0.5.21", "0.5.22", "0.5.23")
    }
    old, new = ["--enable-dp-attention", "--dp", "2"], ["--attn-dp-size", "2"]
    assert list(spelled.values()) == [old, old, new, new]


def test_a_pooled_index_is_known_from_0_5_20_on():
    known = [
        release for release in matrix.tested_releases() if differences.of(HAS_POOLED_INDEX, release)
    ]
    assert known == ["0.5.20", "0.5.21", "0.5.22", "0.5.23"]


def test_a_release_that_is_too_old_is_named():
    with pytest.raises(ValueError, match=r"release: must be 0\.5\.11 or newer, got 0\.5\.9"):
        differences.of(differences.SPARSE, "0.5.9")
