"""Random draft-extend batches in the static buffers that a captured graph reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Inputs:
    """The static buffers that a draft-extend graph reads, for up to max_bs requests.

    seq_lens: int64 [max_bs]; req_pool_indices: int64 [max_bs]; req_to_token: int32 [pool_size,
    width]; accept_lens: int32 [max_bs], of draft-extend's tokens those that are accepted. Padded
    entries point at row 0 of req_to_token, which is all zeros. No request has fewer tokens than
    ``shortest``, and padded entries have as many.
    """

    seq_lens: torch.Tensor
    req_pool_indices: torch.Tensor
    req_to_token: torch.Tensor
    accept_lens: torch.Tensor
    page_size: int
    shortest: int

    @property
    def max_bs(self) -> int:
        """The largest batch size that the buffers hold."""
        return self.seq_lens.shape[0]


def make_inputs(
    device: torch.device | str,
    max_bs: int,
    pool_size: int,
    width: int,
    page_size: int,
    shortest: int = 1,
) -> Inputs:
    """The buffers as the runner makes them: every row padded, the request table empty.

    SGLang's runners pad with 1 token, but draft-extend of a pooled index with more.
    """
    return Inputs(
        seq_lens=torch.full((max_bs,), shortest, dtype=torch.int64, device=device),
        req_pool_indices=torch.zeros(max_bs, dtype=torch.int64, device=device),
        req_to_token=torch.zeros((pool_size, width), dtype=torch.int32, device=device),
        accept_lens=torch.ones(max_bs, dtype=torch.int32, device=device),
        page_size=page_size,
        shortest=shortest,
    )


def table_width(context_len: int, draft_tokens: int, page_size: int) -> int:
    """Columns of req_to_token: the context, and room for speculation to overshoot it."""
    return context_len + max(4 + draft_tokens, page_size)


def random_step(
    inputs: Inputs,
    rng: torch.Generator,
    raw_bs: int,
    bs: int,
    draft_tokens: int,
    max_len: int,
    new_slots: bool = True,
) -> None:
    """Write a random batch of raw_bs requests, padded to bs, the way the runner's execute() does.

    The numbers are drawn on rng's device. A third of the lengths is among the draft_tokens shortest, a
    third just below max_len, the rest anywhere; request indices may repeat. With new_slots, every row of
    req_to_token but row 0 gets new slots, in whole pages: slot = page * page_size + offset.
    """
    if not 0 <= raw_bs <= bs <= inputs.max_bs:
        raise ValueError(
            f"raw_bs, bs: 0 <= raw_bs <= bs <= max_bs must hold, got raw_bs={raw_bs}, bs={bs}, "
            f"max_bs={inputs.max_bs}"
        )
    rows, width = inputs.req_to_token.shape
    if not inputs.shortest <= max_len <= width:
        raise ValueError(
            f"max_len: must lie in {inputs.shortest}..{width}, req_to_token's width, got {max_len}"
        )

    if new_slots:
        inputs.req_to_token[1:].copy_(_random_slots(rng, rows - 1, width, inputs.page_size))
    if raw_bs != bs:
        inputs.seq_lens.fill_(inputs.shortest)
        inputs.req_pool_indices.zero_()
        inputs.accept_lens.fill_(draft_tokens)
    inputs.seq_lens[:raw_bs].copy_(_random_lengths(rng, raw_bs, draft_tokens, inputs.shortest, max_len))
    inputs.req_pool_indices[:raw_bs].copy_(_draw(rng, 1, rows, raw_bs))
    inputs.accept_lens[:raw_bs].copy_(inputs.seq_lens[:raw_bs] % draft_tokens + 1)


def _draw(rng: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    """int64 numbers in low..high-1, on the generator's device."""
    return torch.randint(low, high, shape, generator=rng, device=rng.device)


def _random_slots(rng: torch.Generator, rows: int, width: int, page_size: int) -> torch.Tensor:
    """int32 [rows, width]: token slots of random pages."""
    pages = _draw(rng, 0, 2**31 // page_size, rows, -(-width // page_size), 1).int()
    slots = pages * page_size + torch.arange(page_size, dtype=torch.int32, device=rng.device)
    return slots.view(rows, -1)[:, :width]


def _random_lengths(
    rng: torch.Generator, count: int, draft_tokens: int, shortest: int, longest: int
) -> torch.Tensor:
    """int64 [count] in shortest..longest, see random_step."""
    beyond = _draw(rng, 0, min(draft_tokens, longest - shortest + 1), count)
    short, long = shortest + beyond, longest - beyond
    anywhere = _draw(rng, shortest, longest + 1, count)
    kind = _draw(rng, 0, 3, count)
    return torch.where(kind == 0, short, torch.where(kind == 1, long, anywhere))
