"""A transformer block, and the queries and keys of any backbone's blocks.

Axes: B images, T tokens, D channels, J heads of d channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = ["QueryKey", "TransformerBlock", "attention_probabilities", "query_key"]


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = _split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block of a vision transformer: self-attention, then an MLP with GELU, each added to its input.

    Its parameters have the names of timm's and DeiT's blocks. Attention is computed without its T x T matrix
    (``scaled_dot_product_attention``); `query_key` gives what the matrix is made of, for those who want to see it.

    Args:
        dim: D, width of the tokens.
        num_heads: J, a divisor of D.
        mlp_ratio: Width of the MLP by D.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path: Probability with which a branch is dropped for an image, in training.

    Shapes:
        (B, T, D) -> (B, T, D).

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``drop_path`` outside [0, 1).

    Paper:
        Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929.

    Notes:
        Linear layers start from a normal distribution of deviation 0.02, cut off at 2, biases from 0.

    Example:
        >>> TransformerBlock(24, num_heads=3)(torch.rand(2, 5, 24)).shape
        torch.Size([2, 5, 24])
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, qkv_bias: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pass tokens on, see the class."""
        x = x + self._branch(self.attn(self.norm1(x)))
        return x + self._branch(self.mlp(self.norm2(x)))

    def _branch(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep.to(x.dtype) / (1 - self.drop_path)

    def extra_repr(self) -> str:
        """Show the option."""
        return f"drop_path={self.drop_path}"


class QueryKey(NamedTuple):
    """Queries and keys (B, J, T, d) of a block, before the scale."""

    query: Tensor
    key: Tensor


def query_key(block: nn.Module, tokens: Tensor) -> QueryKey:
    """Compute the queries and keys that a transformer block makes of its input.

    The block is only read: nothing is hooked into it or changed, so that several threads may do this at once.
    ``query @ key.mT`` are the raw attention logits (AFA); `attention_probabilities` are what the block weighs with.

    Args:
        block: A block with ``norm1`` and an ``attn`` that has ``num_heads`` and one linear layer ``qkv`` (ours, timm's
            ViT and DeiT; norms of queries and keys are applied) or two, ``q`` and ``kv`` (MiT, only stages whose keys
            are not spatially reduced).
        tokens: (B, T, D), what the block gets.

    Returns:
        ``query`` and ``key``, (B, J, T, d) each, differentiable.

    Raises:
        TypeError: the block is of another kind, or its attention is more than products of queries and keys: relative
            or rotary positions (BEiT, Swin, EVA, DINOv3), mixed heads (CaiT), channels (XCiT).

    Notes:
        Costs a sixth of the block once more. Outside of this the block runs as its author made it, fused attention
        included.

    Example:
        >>> block = TransformerBlock(24, num_heads=3)
        >>> query, key = query_key(block, torch.rand(2, 5, 24))
        >>> (query @ key.mT).shape
        torch.Size([2, 3, 5, 5])
    """
    check_ndim("tokens", tokens, 3, "(B, T, D)")
    attn: Any = getattr(block, "attn", None)
    norm: Any = getattr(block, "norm1", None)
    heads = getattr(attn, "num_heads", None)
    fused, apart = getattr(attn, "qkv", None), (getattr(attn, "q", None), getattr(attn, "kv", None))
    reduced = max(getattr(attn, "sr_ratio", 1), getattr(attn, "reduction", 1))
    if norm is None or heads is None or reduced != 1 or (fused is None and None in apart):
        raise TypeError(
            "block: expected norm1 and an attn with num_heads and qkv, or q and kv without spatial reduction, got "
            f"{type(block).__name__} with attn {type(attn).__name__}"
        )
    more = sorted({name.partition(".")[0] for name, _ in attn.named_parameters()} - _PARTS)
    if hasattr(attn, "rotate_half"):  # as timm marks rotary positions, which the model itself hands to the block
        more.append("rotary positions")
    if more:
        raise TypeError(
            f"block: expected attention by products of queries and keys alone, got {type(attn).__name__} with "
            + ", ".join(more)
        )
    normed = norm(tokens)
    if fused is not None:
        query, key = _split_heads(_first_two_thirds(fused, normed), 2, heads)
    else:
        (query,) = _split_heads(attn.q(normed), 1, heads)
        key, _ = _split_heads(attn.kv(normed), 2, heads)
    if getattr(attn, "q_norm", None) is not None:
        query, key = attn.q_norm(query), attn.k_norm(key)
    return QueryKey(query, key)


# What the attention of a plain transformer is made of.
_PARTS = {"qkv", "q", "kv", "q_norm", "k_norm", "norm", "proj"}


def _first_two_thirds(linear: Any, x: Tensor) -> Tensor:
    if not isinstance(linear, nn.Linear):  # wrapped, by LoRA for example
        fused = linear(x)
        return fused[..., : 2 * (fused.shape[-1] // 3)]
    wanted = 2 * (linear.out_features // 3)
    return F.linear(x, linear.weight[:wanted], None if linear.bias is None else linear.bias[:wanted])


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``parts`` tensors (B, J, T, d) of (B, T, parts * J * d)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    r"""Attention as weights: :math:`softmax(q k^T / \sqrt{d})` over the keys.

    Args:
        query: (..., T, d), of all tokens or some.
        key: (..., S, d).

    Returns:
        (..., T, S) in at least float32; rows sum to 1.

    Raises:
        ValueError: shapes don't match.

    Example:
        >>> attention_probabilities(torch.zeros(1, 1, 2), torch.rand(1, 4, 2))
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    check_shape("key", key, (*query.shape[:-2], None, query.shape[-1]), "to match query")
    with torch.autocast(query.device.type, enabled=False):
        scaled = at_least_float32(query) * query.shape[-1] ** -0.5
        return torch.softmax(scaled @ at_least_float32(key).mT, -1)
