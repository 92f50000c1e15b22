"""A small DeepSeek-V3.2 style checkpoint whose greedy output depends on the whole context.

    python -m integration.serving.checkpoint DIR

SGLang's dummy weights are so small that a model loops and accepts no draft, which tests nothing.
Here the next token follows mostly from the last one, the context changes it now and then, and the
draft (MTP) layer agrees most of the time.

How. Every embedding row is ``basis @ z`` with z random in ``embed_rank`` dimensions, scaled to norm
sqrt(hidden). ``lm_head[successor(v)] = embedding[v] / sqrt(hidden)``, where ``successor`` is one
cycle through all ordinary tokens, so a residual stream that still is the embedding of v gives
``successor(v)``. Every projection back into the residual stream ends in the same subspace; a
*strength* of 1 makes its contribution as long as an embedding row. Against a contribution of
strength s the successor keeps the highest logit while

    1 + N(0, s^2 / rank)  >  max over the other tokens of N(0, (1 + s^2) / rank),

in units of its own logit; the right side is about 3.5 * sqrt((1 + s^2) / rank). A smaller rank or
a greater strength lets the context decide more often. Attention logits have the standard deviation
``attention_sharpness``, so that one read is dominated by a few tokens and does not average away in
long prompts. Special tokens have a zero row in lm_head and are never generated.

The draft layer's attention is the target's first one, so that it foresees part of what the context
does and loses drafts when it reads the wrong tokens. It starts from the embedding of the newest
token plus ``draft_hidden`` times the rotated hidden state before it, which makes it less certain.

The defaults were chosen with ``acceptance_model.py``, a float32 forward of both models and the EAGLE
loop on the CPU; prompts of 5, 80 and 500 random tokens, 128 new ones each:

    changed                                mean tokens a step   turned by the context
    -                                      2.1  2.9  3.1        15 %  5 %  2 %
    draft_hidden 0.4                       2.4  3.3  3.7        the same
    draft_hidden 1.0                       1.6  2.1  2.4        the same
    first_attention, draft_attention 1.0   3.3  3.9  3.6         6 %  1 %  0 %
    first_attention, draft_attention 1.8   1.4  1.6  2.1        45 % 27 % 19 %
    seed 1                                 2.5  2.8  3.3        17 %  8 %  1 %

More context than that would put more tokens close to a tie, where a sum in another order decides.
With the same forward, 64 overwritten positions of the draft layer's context (one page) changed the
counts of accepted drafts in 7 of 8 requests, its newest position missing in 3 of 8 (short contexts
only). The target's tokens never change: greedy decoding does not depend on the drafts.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 4096
HIDDEN = 1024
LAYERS = 2
HEADS = 64
Q_RANK = 128
KV_RANK = 512
NOPE = 128
ROPE = 64
V_DIM = 128
INDEX_HEADS = 64
INDEX_DIM = 128
INDEX_TOPK = 2048
EXPERTS = 64
EXPERTS_PER_TOKEN = 8
DENSE_FFN = 512
EXPERT_FFN = 32
ROUTED_SCALING = 2.5
BOS, EOS, PAD = VOCAB - 3, VOCAB - 2, VOCAB - 1
ORDINARY = VOCAB - 3
SPECIAL_TOKENS = ["<bos>", "<eos>", "<pad>"]
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "model_max_length": 163840,
    "clean_up_tokenization_spaces": False,
}
YARN_FACTOR = 40
COMPRESS_APE = "index_kpool_compress_ape"  # SGLang's name: of each token's place in its k-pool
IN_FLOAT32 = ("correction_bias", COMPRESS_APE)  # the router's bias and that
SILU_GATE_RMS = 0.596  # root mean square of silu(a) * b for independent standard normal a, b


@dataclass(frozen=True)
class Strengths:
    """How much each part adds to the residual stream, in lengths of an embedding row."""

    embed_rank: int = 32
    first_attention: float = 1.4
    second_attention: float = 0.5
    attention_sharpness: float = 3.25
    ffn: float = 0.25
    draft_attention: float = 1.4
    draft_hidden: float = 0.7


DEFAULTS = Strengths()


def model_config(index_kpool: int = 1) -> dict[str, Any]:
    """The config.json: real key names, small sizes, no quantization.

    With more than one token to an index key, as GLM-5.3-Flash has it; SGLang 0.5.20 and later.
    """
    pooled = {
        "index_kpool": index_kpool,
        "index_kpool_compress": True,
        "index_kpool_always_select_tail": True,
    }
    return {
        **(pooled if index_kpool > 1 else {}),
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE_FFN,
        "moe_intermediate_size": EXPERT_FFN,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": V_DIM,
        "index_n_heads": INDEX_HEADS,
        "index_head_dim": INDEX_DIM,
        "index_topk": INDEX_TOPK,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": ROUTED_SCALING,
        "ep_size": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": YARN_FACTOR,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def successor(seed: int) -> torch.Tensor:
    """int64 [ORDINARY]: the token that follows each ordinary token; one cycle through all."""
    order = torch.randperm(ORDINARY, generator=torch.Generator().manual_seed(seed))
    following = torch.empty(ORDINARY, dtype=torch.int64)
    following[order] = order.roll(-1)
    return following


class _Weights:
    """Builds the tensors by checkpoint name; float32 here, converted when they are written."""

    def __init__(self, seed: int, strengths: Strengths, index_kpool: int = 1):
        self.random = torch.Generator().manual_seed(seed + 1)
        self.strengths = strengths
        self.index_kpool = index_kpool
        self.basis: torch.Tensor = torch.linalg.qr(self.normal(HIDDEN, strengths.embed_rank))[0]
        self.tensors: dict[str, torch.Tensor] = {}

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random) * std

    def project(self, outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        """[outputs, inputs] that turns inputs of RMS 1 into outputs of RMS ``gain``."""
        return self.normal(outputs, inputs, std=gain / math.sqrt(inputs))

    def back_project(self, inputs: int, strength: float) -> torch.Tensor:
        """[HIDDEN, inputs] into the embedding subspace; inputs of RMS 1 give norm
        strength * sqrt(HIDDEN)."""
        rank = self.strengths.embed_rank
        return self.basis @ self.project(rank, inputs, strength * math.sqrt(HIDDEN / rank))

    def embeddings(self, seed: int) -> None:
        rows = self.normal(VOCAB, self.strengths.embed_rank) @ self.basis.T
        rows *= math.sqrt(HIDDEN) / rows.norm(dim=1, keepdim=True)
        head = torch.zeros(VOCAB, HIDDEN)
        head[successor(seed)] = rows[:ORDINARY] / math.sqrt(HIDDEN)
        self.tensors["model.embed_tokens.weight"] = rows
        self.tensors["lm_head.weight"] = head
        self.tensors["model.norm.weight"] = torch.ones(HIDDEN)

    def attention(self, prefix: str, strength: float) -> None:
        mscale = 0.1 * math.log(YARN_FACTOR) + 1.0
        query_gain = self.strengths.attention_sharpness / mscale**2
        self.tensors |= {
            f"{prefix}.q_a_proj.weight": self.project(Q_RANK, HIDDEN),
            f"{prefix}.q_a_layernorm.weight": torch.ones(Q_RANK),
            f"{prefix}.q_b_proj.weight": self.project(HEADS * (NOPE + ROPE), Q_RANK, query_gain),
            f"{prefix}.kv_a_proj_with_mqa.weight": self.project(KV_RANK + ROPE, HIDDEN),
            f"{prefix}.kv_a_layernorm.weight": torch.ones(KV_RANK),
            f"{prefix}.kv_b_proj.weight": self.project(HEADS * (NOPE + V_DIM), KV_RANK),
            f"{prefix}.o_proj.weight": self.back_project(HEADS * V_DIM, strength),
            f"{prefix}.indexer.wq_b.weight": self.project(INDEX_HEADS * INDEX_DIM, Q_RANK),
            f"{prefix}.indexer.wk.weight": self.project(INDEX_DIM, HIDDEN),
            f"{prefix}.indexer.k_norm.weight": torch.ones(INDEX_DIM),
            f"{prefix}.indexer.k_norm.bias": self.normal(INDEX_DIM, std=0.1),
            f"{prefix}.indexer.weights_proj.weight": self.project(INDEX_HEADS, HIDDEN),
        }
        if self.index_kpool > 1:
            self.pooling(f"{prefix}.indexer")

    def pooling(self, prefix: str) -> None:
        """How much each token of a k-pool has of its key: by its hidden state and its place."""
        self.tensors |= {
            f"{prefix}.{COMPRESS_APE}": self.normal(self.index_kpool, INDEX_DIM, std=0.1),
            f"{prefix}.index_kpool_compress_gate": self.project(INDEX_DIM, HIDDEN),
        }

    def ffn(self, prefix: str, width: int, strength: float) -> None:
        self.tensors |= {
            f"{prefix}.gate_proj.weight": self.project(width, HIDDEN),
            f"{prefix}.up_proj.weight": self.project(width, HIDDEN),
            f"{prefix}.down_proj.weight": self.back_project(width, strength / SILU_GATE_RMS),
        }

    def moe(self, prefix: str) -> None:
        each = self.strengths.ffn / math.sqrt(2)  # half the variance from the shared expert
        routed = each * math.sqrt(EXPERTS_PER_TOKEN) / ROUTED_SCALING
        self.tensors[f"{prefix}.gate.weight"] = self.project(EXPERTS, HIDDEN)
        self.tensors[f"{prefix}.gate.e_score_correction_bias"] = self.normal(EXPERTS, std=0.02)
        for expert in range(EXPERTS):
            self.ffn(f"{prefix}.experts.{expert}", EXPERT_FFN, routed)
        self.ffn(f"{prefix}.shared_experts", EXPERT_FFN, each)

    def layer(self, index: int, attention_strength: float, *, dense: bool) -> None:
        prefix = f"model.layers.{index}"
        self.attention(f"{prefix}.self_attn", attention_strength)
        if dense:
            self.ffn(f"{prefix}.mlp", DENSE_FFN, self.strengths.ffn)
        else:
            self.moe(f"{prefix}.mlp")
        self.tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN)
        self.tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)

    def draft(self) -> None:
        """The MTP layer: ``eh_proj`` takes [norm(embedding), norm(hidden state)]. Its attention is
        the first layer's, so that it can foresee part of what the context does to the target."""
        prefix = f"model.layers.{LAYERS}"
        rank = self.strengths.embed_rank
        self.layer(LAYERS, self.strengths.draft_attention, dense=False)
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            copied = self.tensors[f"model.layers.0.self_attn.{name}.weight"]
            self.tensors[f"{prefix}.self_attn.{name}.weight"] = copied.clone()
        ratio = self.strengths.draft_attention / self.strengths.first_attention
        self.tensors[f"{prefix}.self_attn.o_proj.weight"] *= ratio
        rotation = torch.linalg.qr(self.normal(rank, rank))[0] * self.strengths.draft_hidden
        mixed = self.basis @ rotation @ self.basis.T
        self.tensors |= {
            f"{prefix}.enorm.weight": torch.ones(HIDDEN),
            f"{prefix}.hnorm.weight": torch.ones(HIDDEN),
            f"{prefix}.eh_proj.weight": torch.cat([torch.eye(HIDDEN), mixed], dim=1),
            f"{prefix}.shared_head.norm.weight": torch.ones(HIDDEN),
        }


def build_weights(
    seed: int = 0, strengths: Strengths = DEFAULTS, index_kpool: int = 1
) -> dict[str, torch.Tensor]:
    """All tensors by checkpoint name, bfloat16 except those that SGLang keeps in float32."""
    weights = _Weights(seed, strengths, index_kpool)
    weights.embeddings(seed)
    weights.layer(0, strengths.first_attention, dense=True)
    weights.layer(1, strengths.second_attention, dense=False)
    weights.draft()
    return {
        name: tensor.float() if name.endswith(IN_FLOAT32) else tensor.bfloat16()
        for name, tensor in weights.tensors.items()
    }


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer: ids 0 to 255 are bytes, then names for the rest of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"<{i}>" for i in range(len(alphabet), ORDINARY)] + SPECIAL_TOKENS
    model = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(SPECIAL_TOKENS)
    return model


def write_checkpoint(
    path: str | Path, *, seed: int = 0, strengths: Strengths = DEFAULTS, index_kpool: int = 1
) -> Path:
    """Write config.json, tokenizer and model.safetensors (172 MB) into the folder ``path``.

    The same seed and strengths give the same bytes with the same torch release. Returns the
    folder. Raises ValueError for strengths that cannot be built.
    """
    if not 2 <= strengths.embed_rank <= HIDDEN:
        raise ValueError(
            f"embed_rank: must be 2 to {HIDDEN} (the hidden size), got {strengths.embed_rank}"
        )
    if strengths.first_attention <= 0:
        raise ValueError(
            f"first_attention: must be positive (the draft layer's attention is scaled from it), "
            f"got {strengths.first_attention}"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model_config(index_kpool), indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"))
    built = build_weights(seed, strengths, index_kpool)
    weights = {name: tensor.contiguous() for name, tensor in built.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def add_strength_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `Strengths`."""
    for field in fields(Strengths):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where to write; created if missing")
    parser.add_argument("--seed", type=int, default=0)
    add_strength_options(parser)
    arguments = vars(parser.parse_args())
    folder, seed = arguments.pop("folder"), arguments.pop("seed")
    written = write_checkpoint(folder, seed=seed, strengths=Strengths(**arguments))
    size = sum(file.stat().st_size for file in written.iterdir())
    print(f"{written}: {size / 1e6:.0f} MB, {LAYERS} layers and one MTP layer, seed {seed}")


if __name__ == "__main__":
    main()
