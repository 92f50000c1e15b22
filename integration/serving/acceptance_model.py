"""How many drafts the checkpoint's MTP layer gets accepted, estimated without SGLang or a GPU.

    python -m integration.serving.acceptance_model --draft-hidden 0.9 --lengths 5 80 500

Runs the weights of `checkpoint` through a plain float32 forward of the target and of the draft
layer and walks the EAGLE loop (greedy, 3 drafts a step) for one random prompt of each length. Use
it to choose other strengths. It prints for each prompt how many steps accepted 0, 1, 2 and 3
drafts, the mean tokens of a step, and the share of tokens that the context turned away from the
successor.

The indexer is left out, so a prompt with its answer must stay within index_topk (2048) tokens,
where it selects everything. bfloat16 rounding is left out as well.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields

import torch
from torch.nn.functional import silu

from integration.serving import checkpoint as c

STEPS = 3
GROUPS = 4
TOP_GROUPS = 2
ROWS_AT_ONCE = 64  # bounds the attention matrix of a long prompt
ATTENTION_SCALE = (c.NOPE + c.ROPE) ** -0.5 * (0.1 * math.log(c.YARN_FACTOR) + 1) ** 2


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def yarn_frequencies() -> torch.Tensor:
    """[ROPE / 2]: interpolated for slow dimensions, kept for fast ones, a ramp between."""
    base, original = 10000.0, 4096
    exact = base ** -(torch.arange(0, c.ROPE, 2).float() / c.ROPE)

    def dimension(turns: int) -> float:
        return c.ROPE * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    keep = 1 - ((torch.arange(c.ROPE // 2) - low) / (high - low)).clamp(0, 1)
    return exact / c.YARN_FACTOR * (1 - keep) + exact * keep


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, …, ROPE], pairs interleaved."""
    angles = positions.float()[:, None] * yarn_frequencies()
    angles = angles.view(len(positions), *[1] * (x.dim() - 2), c.ROPE // 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def feed_forward(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    gate, up, down = weights
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


class Layer:
    """One decoder layer with the compressed KV of one request."""

    def __init__(self, weights: dict[str, torch.Tensor], index: int) -> None:
        self.weights = weights
        self.prefix = f"model.layers.{index}"
        kv_b = self._get("self_attn.kv_b_proj").view(c.HEADS, c.NOPE + c.V_DIM, c.KV_RANK)
        self.key_up, self.value_up = kv_b[:, : c.NOPE], kv_b[:, c.NOPE :]
        self.is_dense = f"{self.prefix}.mlp.gate_proj.weight" in weights
        self.cache = torch.zeros(c.INDEX_TOPK + STEPS + 1, c.KV_RANK + c.ROPE)

    def _get(self, name: str) -> torch.Tensor:
        return self.weights[f"{self.prefix}.{name}.weight"]

    def _three(self, name: str) -> list[torch.Tensor]:
        return [self._get(f"{name}.{part}_proj") for part in ("gate", "up", "down")]

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """x [tokens, HIDDEN] at positions from ``start``; KV from ``start`` on is forgotten."""
        x = x + self._attention(rms_norm(x), start)
        normed = rms_norm(x)
        if self.is_dense:
            return x + feed_forward(normed, self._three("mlp"))
        return x + self._experts(normed)

    def _attention(self, x: torch.Tensor, start: int) -> torch.Tensor:
        positions = torch.arange(start, start + len(x))
        latent = x @ self._get("self_attn.kv_a_proj_with_mqa").T
        self.cache[positions] = torch.cat(
            [rms_norm(latent[:, : c.KV_RANK]), rotate(latent[:, c.KV_RANK :], positions)], dim=-1
        )
        query = rms_norm(x @ self._get("self_attn.q_a_proj").T) @ self._get("self_attn.q_b_proj").T
        query = query.view(len(x), c.HEADS, c.NOPE + c.ROPE)
        absorbed = torch.einsum("thd,hdk->thk", query[..., : c.NOPE], self.key_up)
        query = torch.cat([absorbed, rotate(query[..., c.NOPE :], positions)], dim=-1)
        blocks = zip(query.split(ROWS_AT_ONCE), positions.split(ROWS_AT_ONCE), strict=True)
        read = torch.cat([self._read(rows, at) for rows, at in blocks])
        value = torch.einsum("thk,hdk->thd", read, self.value_up)
        return value.flatten(1) @ self._get("self_attn.o_proj").T

    def _read(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        known = self.cache[: int(positions[-1]) + 1]
        logits = torch.einsum("thk,nk->thn", query, known) * ATTENTION_SCALE
        future = torch.arange(len(known)) > positions[:, None]
        shares = logits.masked_fill(future[:, None], -torch.inf).softmax(-1)
        return torch.einsum("thn,nk->thk", shares, known[:, : c.KV_RANK])

    def _experts(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self._get("mlp.gate").T).sigmoid()
        biased = scores + self.weights[f"{self.prefix}.mlp.gate.e_score_correction_bias"]
        groups = biased.view(len(x), GROUPS, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(TOP_GROUPS, dim=-1).indices
        closed = torch.ones(len(x), GROUPS, dtype=torch.bool).scatter_(1, best, False)
        closed = closed.repeat_interleave(c.EXPERTS // GROUPS, dim=1)
        chosen = biased.masked_fill(closed, -torch.inf).topk(c.EXPERTS_PER_TOKEN, dim=-1).indices
        shares = scores.gather(1, chosen)
        shares = shares / shares.sum(-1, keepdim=True) * c.ROUTED_SCALING
        output = feed_forward(x, self._three("mlp.shared_experts"))
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            added = feed_forward(x[token], self._three(f"mlp.experts.{expert}"))
            output = output.index_add(0, token, added * shares[token, place, None])
        return output


class Models:
    """Target and draft model; both return (hidden states, next tokens)."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        weights = {name: tensor.float() for name, tensor in weights.items()}
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights["lm_head.weight"]
        self.eh_proj = weights[f"model.layers.{c.LAYERS}.eh_proj.weight"]
        self.layers = [Layer(weights, index) for index in range(c.LAYERS)]
        self.draft_layer = Layer(weights, c.LAYERS)

    def target(self, tokens: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer.forward(x, start)
        return self._finish(x)

    def draft(
        self, tokens: torch.Tensor, hidden: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token i + 1 goes with the hidden state of position i, at position i."""
        both = torch.cat([rms_norm(self.embedding[tokens]), rms_norm(hidden)], dim=-1)
        return self._finish(self.draft_layer.forward(both @ self.eh_proj.T, start))

    def _finish(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = rms_norm(x)
        return hidden, (hidden @ self.head.T).argmax(-1)


def walk(models: Models, prompt: torch.Tensor, new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy generation with 3 drafts a step.

    Returns:
        steps by accepted drafts (4 counts), and prompt + new tokens [len(prompt) + new_tokens].
    """
    if len(prompt) + new_tokens + STEPS + 1 > c.INDEX_TOPK:
        raise ValueError(
            f"prompt and new tokens: must stay within {c.INDEX_TOPK - STEPS - 1} together, "
            f"got {len(prompt)} and {new_tokens}; the indexer is not modelled"
        )
    hidden, following = models.target(prompt, 0)
    tokens = torch.cat([prompt, following[-1:]])
    draft_hidden, draft = models.draft(tokens[1:], hidden, 0)
    accepted_by_step = [0] * (STEPS + 1)
    while len(tokens) < len(prompt) + new_tokens:
        start = len(tokens) - 1
        drafts, step_hidden = [draft[-1:]], draft_hidden[-1:]
        for step in range(STEPS - 1):
            step_hidden, token = models.draft(drafts[-1], step_hidden, start + step)
            drafts.append(token)
        candidates = torch.cat([tokens[-1:], *drafts])
        hidden, following = models.target(candidates, start)
        accepted = int((following[:-1] == candidates[1:]).long().cumprod(0).sum())
        accepted_by_step[accepted] += 1
        kept = following[: accepted + 1]
        tokens = torch.cat([tokens, kept])
        draft_hidden, draft = models.draft(kept, hidden[: accepted + 1], start)
    return accepted_by_step, tokens[: len(prompt) + new_tokens]


def turned_share(tokens: torch.Tensor, prompt_length: int, seed: int) -> float:
    """Share of new tokens that are not the successor of the token before them."""
    before, after = tokens[prompt_length - 1 : -1], tokens[prompt_length:]
    return float((c.successor(seed)[before] != after).float().mean())


def mean_tokens(accepted_by_step: list[int]) -> float:
    """Tokens of a step: the accepted drafts and the target's own next token."""
    tokens = sum((accepted + 1) * steps for accepted, steps in enumerate(accepted_by_step))
    return tokens / sum(accepted_by_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 80, 500])
    parser.add_argument("--new-tokens", type=int, default=128)
    c.add_strength_options(parser)
    arguments = parser.parse_args()
    names = [field.name for field in fields(c.Strengths)]
    strengths = c.Strengths(**{name: getattr(arguments, name) for name in names})
    models = Models(c.build_weights(arguments.seed, strengths))
    random = torch.Generator().manual_seed(arguments.seed)
    total = [0] * (STEPS + 1)
    for length in arguments.lengths:
        prompt = torch.randint(c.ORDINARY, (length,), generator=random)
        steps, tokens = walk(models, prompt, arguments.new_tokens)
        total = [a + b for a, b in zip(total, steps, strict=True)]
        turned = turned_share(tokens, length, arguments.seed)
        print(
            f"prompt {length:5d}: accepted 0/1/2/3 drafts in {steps} steps, "
            f"mean {mean_tokens(steps):.2f} tokens, {turned:.1%} turned by the context"
        )
    print(f"all: {total}, mean {mean_tokens(total):.2f} tokens a step")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
