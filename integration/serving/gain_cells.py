"""The servers and cells of the slice ``gain``, and what filling the whole step has to reach in them.

A cell is a number of requests at once on a server, with the GPU to itself or beside a process that only
holds a context. Two layers of a real checkpoint are bound by the host. 61 thin layers of dummy weights
have the kernels and the graph of a full model, and are bound by the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from integration.releases.differences import decode_graphs
from sglang_nsa_plugin.state import ROLES

MILLION = 1 << 20
CONTEXTS = {"160k": 163_840, "1m": MILLION}
WHOLE_STEP = set(ROLES)
SMALL = (1, 4, 16)
CONTEXT = "context"  # a process that holds one on the same GPU
# A step with all roles filled, on ÷ off, at most.
GOAL_HOST_BOUND, GOAL_64_OF_A_MILLION, NO_SLOWER = 0.76, 0.85, 1.0


@dataclass(frozen=True)
class Regime:
    """One server.

    Attributes:
        layers: of the target model.
        context: a key of CONTEXTS.
        requests: at once, a cell each.
        beside: those that are also measured beside a process that holds a context.
        is_fp8: the KV cache is FP8.
    """

    layers: int
    context: str
    requests: tuple[int, ...]
    beside: tuple[int, ...] = ()
    is_fp8: bool = False

    @property
    def name(self) -> str:
        """As the result file names it."""
        return f"{self.layers}-layers-{self.context}-{'fp8' if self.is_fp8 else 'bf16'}"

    @property
    def options(self) -> list[str]:
        """Of ``ab``. Steps of two layers are short, and uneven from one batch to the next, so that many
        short rounds tell more; with dummy weights a step is a token."""
        rounds, new_tokens = (40, 192) if self.layers == 2 else (7, 64)
        return ["--rounds", str(rounds), "--output-len", str(new_tokens)]

    @property
    def args(self) -> list[str]:
        """Options of the server; those of a server that has the GPU to itself win."""
        from integration.serving.ab_servers import FP8, serve_args  # not for the pages: imports requests

        overrides: dict[str, Any] = {}
        args = serve_args("flashmla_kv" if self.is_fp8 else "flashmla_sparse")
        args += [*(FP8 if self.is_fp8 else ()), *captured(self.requests)]
        if self.layers > 2:
            overrides["num_hidden_layers"] = self.layers
            args += ["--load-format", "dummy"]
        if self.context == "1m":
            overrides["max_position_embeddings"] = MILLION
            args += ["--context-length", str(MILLION)]
        return [*args, *(["--json-model-override-args", json.dumps(overrides)] if overrides else [])]

    @property
    def cells(self) -> list[Cell]:
        """Those alone on the GPU first."""
        alone = [Cell(self, requests) for requests in self.requests]
        return [*alone, *(Cell(self, requests, CONTEXT) for requests in self.beside)]


@dataclass(frozen=True)
class Cell:
    """A number of requests at once on a server."""

    regime: Regime
    requests: int
    beside: str | None = None

    @property
    def name(self) -> str:
        """As ``pytest -k`` takes it."""
        return f"{self.regime.name}-{self.requests}-{'beside' if self.beside else 'alone'}"

    def part(self, roles: Iterable[str], suffixes: Iterable[str] = ()) -> str:
        """Its name in the result file, where cells of other roles have other names."""
        names = [self.regime.name, str(self.requests), "+".join(sorted(roles))]
        return ".".join([*names, *([f"beside-a-{self.beside}"] if self.beside else []), *suffixes])

    @property
    def goal(self) -> float | None:
        """The most that on ÷ off of a step may be with the whole step filled; None without a goal."""
        if self.regime.is_fp8 or self.requests > 64:
            return None
        if self.regime.layers == 2:
            return GOAL_HOST_BOUND
        if self.requests <= SMALL[-1]:
            return NO_SLOWER
        return GOAL_64_OF_A_MILLION if self.regime.context == "1m" else None

    def bound(self, roles: Iterable[str], found: dict[str, Any]) -> dict[str, Any] | None:
        """The goal, and whether it is met; None where there is none, or SGLang fills a role.

        A step that must not get slower may be longer by as much as the control strays from 1. ``met`` is
        None in a cell that is not resolved.
        """
        if self.goal is None or set(roles) != WHOLE_STEP:
            return None
        if not found["resolved"]:
            return {"at_most": self.goal, "met": None}
        control = found["step_off_over_off"]
        noise = max(abs(control["low"] - 1), abs(control["high"] - 1))
        limit = self.goal + (noise if self.goal == NO_SLOWER else 0)
        met = found["step_on_over_off"]["median"] <= limit
        return {"at_most": self.goal, "with_noise": round(limit, 4), "met": met}


def captured(sizes: tuple[int, ...]) -> list[str]:
    """Options that capture graphs for these numbers of requests alone: the server starts sooner."""
    most = sizes[-1]
    tokens = ["--max-total-tokens", "400000"] if most > 64 else []
    return [*decode_graphs(most, sizes), "--max-running-requests", str(most), *tokens]


REGIMES = (
    Regime(2, "160k", (1, 16, 64)),
    Regime(61, "1m", (*SMALL, 64), beside=SMALL),
    Regime(61, "160k", (*SMALL, 64), beside=SMALL),
    Regime(2, "160k", (1, 16, 64), is_fp8=True),
    Regime(61, "160k", (*SMALL, 64), is_fp8=True),
    Regime(2, "160k", (256,)),
    Regime(61, "160k", (256,)),
    Regime(61, "1m", (256,)),
)
