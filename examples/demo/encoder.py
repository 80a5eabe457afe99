# SPDX-License-Identifier: Apache-2.0
"""A BERT encoder in plain torch, small enough to read, whose attention can be replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Encoder:
    """all-MiniLM-L6-v2: six layers, 12 heads of 32 channels, at most 512 tokens.

    Args:
        model_dir: folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
        device: where the weights live and the encoder runs, in float32.
    """

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.eps: float = config["layer_norm_eps"]
        self.max_tokens: int = config["max_position_embeddings"]
        self.weights = {k: v.to(device) for k, v in load_file(model_dir / "model.safetensors").items()}
        self.device = device
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_tokens)

    def tokens(self, text: str) -> torch.Tensor:
        """Token ids of `text`, int64 ``[1, S]``."""
        return torch.tensor([self.tokenizer.encode(text).ids], device=self.device)

    def __call__(self, tokens: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Runs the encoder.

        Args:
            tokens: int64 ``[1, S]``.
            attention: takes Q, K and V, float32 ``[1, 12, S, 32]`` (views into the layer's projections), and
                returns the attention output in the same shape.

        Returns:
            The text's unit-length embedding, float32 ``[1, 384]``.
        """
        w = self.weights
        positions = torch.arange(tokens.shape[1], device=self.device)
        x = w["embeddings.word_embeddings.weight"][tokens]
        x = x + w["embeddings.position_embeddings.weight"][positions] + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self.layers):
            p = f"encoder.layer.{layer}."
            q, k, v = (self._split(self._linear(x, f"{p}attention.self.{name}")) for name in ("query", "key", "value"))
            context = attention(q, k, v).transpose(1, 2).flatten(2)
            x = self._norm(x + self._linear(context, p + "attention.output.dense"), p + "attention.output.LayerNorm")
            hidden = F.gelu(self._linear(x, p + "intermediate.dense"))
            x = self._norm(x + self._linear(hidden, p + "output.dense"), p + "output.LayerNorm")
        return F.normalize(x.mean(dim=1), dim=-1)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], self.eps)
