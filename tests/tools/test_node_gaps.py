"""What ``node_gaps`` makes of its samples; what it measures needs a GPU."""

import pytest

pytest.importorskip("triton.language.extra.cuda", reason="needs Triton's CUDA extras")

from integration.gpu import node_gaps


def test_a_case_has_its_quartiles_in_each_situation():
    case = {"graph": "plain", "start": "24 plain", "before": "nothing", "event": False}
    other = {**case, "event": True}
    rows = [
        {"situation": "alone", **case, "us": {"median": 2.0, "q1": 1.0, "q3": 3.0}},
        {"situation": "alone", **other, "us": {"median": 9.0, "q1": 9.0, "q3": 9.0}},
        {"situation": "profiled", **case, "us": {"median": 5.0, "q1": 4.0, "q3": 6.0}},
    ]
    assert node_gaps.by_case(rows) == {
        "situations": ["alone", "profiled"],
        "rows": [
            {**case, "us": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]},
            {**other, "us": [[9.0, 9.0, 9.0], None]},
        ],
    }


def test_the_spread_is_the_median_and_the_quartiles():
    assert node_gaps.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.0, "q1": 1.5, "q3": 52.0}


def test_calls_are_made_in_their_order():
    made: list[str] = []
    node_gaps.several(lambda: made.append("a"), lambda: made.append("b"))()
    assert made == ["a", "b"]
