"""Steps of a backend that the eager adapter took over, beside SGLang's own planning of the same batch.

Every field of the two metadata objects is compared: tensors by shape, dtype and live values, other
fields by value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import eager, fields
from sglang_nsa_plugin.harness.diff import Diff, compare_planned
from sglang_nsa_plugin.harness.eager_backend import EagerBackend
from sglang_nsa_plugin.harness.pair import BackendPair
from sglang_nsa_plugin.self_test import POISON
from sglang_nsa_plugin.state import STATE


class EagerPair(BackendPair[EagerBackend]):
    """:class:`BackendPair` whose eager steps have any size; ragged replays one of the batch sizes."""

    make_backend = EagerBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.ours.backend, eager.ATTRIBUTE):
            raise RuntimeError(f"the plugin did not take over SGLang's backend: {STATE.reason}")

    def _hand_back(self, backend: Any) -> None:
        eager.hand_back(backend)

    def bucket(self, raw_bs: int) -> int:
        """An eager step has as many requests as there are."""
        return raw_bs

    def step(self, bs: int, diff: Diff, global_num_tokens: list[int] | None = None) -> None:
        """Both plan the batch in ``inputs``, ours over poisoned tensors; every field is compared.

        Lengths are raised to the rows per request, which a server's lengths include: for shorter ones
        SGLang writes negative lengths and makes its schedule from those.
        """
        self.inputs.seq_lens.clamp_(min=self.ours.draft_tokens)
        self.plan_both(self.ours.batch(bs, global_num_tokens), diff)

    def plan_both(self, batch: Any, diff: Diff) -> None:
        """The same for this batch, as it is."""
        before = getattr(self.ours.backend, "forward_metadata", None)
        if before is not None:
            self._poison(before)
        self.ours.plan(batch)
        self.theirs.sglang_plan(batch)
        ours, theirs = self.ours.backend.forward_metadata, self.theirs.backend.forward_metadata
        compare_planned(ours, theirs, self.ours.names, diff)

    def before_replay(self, bs: int) -> Callable[[], None]:
        """The worker's call for one batch of the taken-over backend, for :meth:`stub_process`."""
        batch = self.ours.batch(bs)
        return lambda: self.ours.backend.init_forward_metadata(batch)

    def sglang_before_replay(self, bs: int) -> Callable[[], None]:
        """The same call of the untouched backend, whose hook calls SGLang's own code."""
        batch = self.theirs.batch(bs)
        return lambda: self.theirs.backend.init_forward_metadata(batch)

    def capture_setup(self, bs: int) -> None:
        """Makes the metadata objects of a ragged graph."""
        self.ours.capture_setup(bs)
        self.theirs.capture_setup(bs)

    def ragged_step(self, bs: int, accepted: torch.Tensor, diff: Diff) -> None:
        """Both fill the tensors of a ragged graph; the rows of accepted tokens are compared."""
        ours = self.ours.backend.decode_cuda_graph_metadata[bs]
        self._poison(ours)
        self.ours.replay(bs, accepted)
        self.theirs.sglang_replay(bs, accepted)
        theirs = self.theirs.backend.decode_cuda_graph_metadata[bs]
        compare_planned(ours, theirs, self.ours.names, diff, rows_per_request=accepted[:bs])

    def _poison(self, metadata: Any) -> None:
        """Lengths that the next fill of this shape has to overwrite."""
        for tensor in fields.read(metadata, self.ours.names.outputs, fields.LENGTHS).values():
            tensor.fill_(POISON)
