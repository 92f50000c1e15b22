"""How the rows of an adapter's table are looked up, on targets of this file."""

from __future__ import annotations

import dataclasses

import pytest

from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook, Sets, misfits


@dataclasses.dataclass
class Metadata:
    lengths: int
    table: int


class Plain:
    lengths: int

    def method(self, batch, extra):
        self.written = batch
        return extra


def replacement(original, *args):
    return original(*args)


METHOD = f"{__name__}.Plain.method"
FITTING = {
    "a hook": Hook(METHOD, ("self", "batch", "extra"), replacement),
    "a hook that fits another release": Hook(
        METHOD, ("self",), replacement, also=(("self", "batch", "extra"),)
    ),
    "a hook that hands more through": Hook(METHOD, ("self", "batch"), replacement, and_more=True),
    "a call, which leaves the last parameter out": Call(METHOD, ("self", "batch")),
    "fields": Fields(f"{__name__}.Metadata", ("table", "lengths")),
    "attributes": Sets(METHOD, ("written",)),
}


@pytest.mark.parametrize("row", FITTING.values(), ids=FITTING)
def test_what_fits(row):
    assert misfits([row]) == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            Hook(METHOD, ("self", "batch"), replacement),
            "takes (self, batch, extra), expected (self, batch)",
        ),
        (
            Hook(METHOD, ("self",), replacement, also=(("batch",),)),
            "takes (self, batch, extra), expected (self) or (batch)",
        ),
        (
            Hook(METHOD, ("self", "extra"), replacement, and_more=True),
            "takes (self, batch, extra), expected (self, extra)",
        ),
        (Call(METHOD, ("self", "extra")), "takes (self, batch, extra), expected (self, extra)"),
        (Sets(METHOD, ("written", "read")), "sets no attribute read"),
    ],
)
def test_what_does_not_fit_a_method(row, why):
    assert misfits([row]) == [f"{METHOD} {why}"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            Fields(f"{__name__}.Metadata", ("lengths", "ragged", "odd")),
            "Metadata has no field ragged, odd",
        ),
        (Fields(f"{__name__}.Plain", ("lengths",)), "Plain is not a dataclass"),
        (Call(f"{__name__}.FITTING", ()), "FITTING is not a function"),
    ],
)
def test_what_does_not_fit_a_target(row, why):
    assert misfits([row]) == [f"{__name__}.{why}"]


@pytest.mark.parametrize("target", [f"{__name__}.Plain.gone", "no_such_module.function"])
def test_a_missing_target(target):
    (why,) = misfits([Call(target, ())])
    assert why.startswith(f"{target} is missing (")
