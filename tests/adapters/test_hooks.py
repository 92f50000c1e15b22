"""How the rows of an adapter's table are looked up, on targets of this file."""

from __future__ import annotations

import dataclasses
import sys

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

    def optional(self, batch, extra=None, *more, flag=False, **named):
        self.also_written = batch

    def by_name(self, *, batch, device):
        return batch, device


def replacement(original, *args):
    return original(*args)


def by_position(original, owner, batch):
    return original(owner, batch)


METHOD = f"{__name__}.Plain.method"
OPTIONAL = f"{__name__}.Plain.optional"
BY_NAME = f"{__name__}.Plain.by_name"
FITTING = {
    "a hook": Hook(METHOD, ("self", "batch", "extra"), replacement),
    "a hook that fits another release": Hook(
        METHOD, ("self",), replacement, also=(("self", "batch", "extra"),)
    ),
    "a call by another name": Call(METHOD, ("self", "rows"), also=(("self", "batch", "extra"),)),
    "a hook that hands more through": Hook(METHOD, ("self", "batch"), replacement, and_more=True),
    "a hook of what may be passed more": Hook(OPTIONAL, ("self", "batch"), replacement),
    "a hook of what is passed by name": Hook(BY_NAME, ("self", "device", "batch"), replacement),
    "a call, which leaves out what it may": Call(OPTIONAL, ("self", "batch")),
    "fields": Fields(f"{__name__}.Metadata", ("table", "lengths")),
    "attributes": Sets(METHOD, ("written",)),
    "attributes that several methods set": Sets(f"{__name__}.Plain", ("written", "also_written")),
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
        (Call(METHOD, ("self", "batch")), "takes (self, batch, extra), expected (self, batch)"),
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
        (
            Call(f"{__name__}.Plain.optional", ("self", "extra")),
            "Plain.optional takes (self, batch, extra, more, flag, named), expected (self, extra)",
        ),
        (
            Hook(f"{__name__}.Plain.by_name", ("self", "batch"), replacement),
            "Plain.by_name takes (self, batch, device), expected (self, batch)",
        ),
        (
            Hook(f"{__name__}.Plain.by_name", ("self", "batch", "device"), by_position),
            "Plain.by_name takes batch by name alone, expected by position",
        ),
        (Sets(f"{__name__}.Plain", ("written", "read")), "Plain sets no attribute read"),
        (Call(f"{__name__}.FITTING", ()), "FITTING is not a function"),
    ],
)
def test_what_does_not_fit_a_target(row, why):
    assert misfits([row]) == [f"{__name__}.{why}"]


@pytest.mark.parametrize("target", [f"{__name__}.Plain.gone", "no_such_module.function"])
def test_a_missing_target(target):
    (why,) = misfits([Call(target, ())])
    assert why.startswith(f"{target} is missing (")


def test_a_subclass_in_place_of_a_class_sets_what_that_class_sets(monkeypatch):
    """As another plugin puts one in place; a class that derives from nothing does not fit."""
    row = Sets(f"{__name__}.Plain", ("written", "also_written"))
    monkeypatch.setattr(sys.modules[__name__], "Plain", type("Derived", (Plain,), {}))
    assert misfits([row]) == []
    monkeypatch.setattr(sys.modules[__name__], "Plain", type("Other", (), {}))
    assert misfits([row]) == [f"{__name__}.Plain sets no attribute written, also_written"]
