"""Mix Transformer (SegFormer's encoder) with attention that can be exported.

Axes: B images, N = h w tokens, D channels, H W pixels, M tokens of the reduced grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_shape

__all__ = ["EfficientSelfAttention", "MixTransformer", "MixTransformerOutput"]


class EfficientSelfAttention(nn.Module):
    r"""Self-attention whose keys and values come from a coarser grid, and which can give its logits away.

    .. math:: s = q k^\top, \qquad y = W_o\, \mathrm{softmax}(s / \sqrt{d})\, v

    With ``sr_ratio`` r > 1, keys and values are read off the grid after an r x r convolution of stride r.

    Args:
        dim: D, channels in and out.
        num_heads: heads; D is a multiple of it.
        sr_ratio: r, cells a side that keys and values are reduced by.
        qkv_bias: biases of the projections of queries, keys and values.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or a size below 1.

    Paper:
        Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS 2021,
        arXiv:2105.15203; its attention as affinity: Ru et al., CVPR 2022, arXiv:2203.02664.

    Differences:
        AFA's paper speaks of attention matrices; its code takes s itself: not divided by the root of d, no softmax. So
        do the exported logits. With r > 1 the queries are averaged over r x r cells, which makes the matrix square.

    Notes:
        Without the export, the fused attention of torch runs, and no N x M matrix is stored. Parameters are named as in
        the released code.

    Example:
        >>> import torch
        >>> from wsss_modules import EfficientSelfAttention
        >>> layer = EfficientSelfAttention(16, num_heads=4, sr_ratio=2)
        >>> out, logits = layer(torch.randn(1, 24, 16), (4, 6), return_logits=True)
        >>> out.shape, logits.shape
        (torch.Size([1, 24, 16]), torch.Size([1, 4, 6, 6]))
    """

    def __init__(self, dim: int, num_heads: int = 8, sr_ratio: int = 1, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if min(dim, num_heads, sr_ratio) < 1 or dim % num_heads:
            raise ValueError(
                f"dim, num_heads, sr_ratio: expected at least 1, dim a multiple of num_heads, "
                f"got {dim}, {num_heads}, {sr_ratio}"
            )
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(
        self, tokens: Tensor, size: tuple[int, int], *, return_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            tokens: (B, N, D) float, row by row.
            size: height h and width w of the grid, at least r each; N = h w.
            return_logits: also return s.

        Returns:
            (B, N, D), and s (B, heads, M, M) with M = (h // r)(w // r), or None.

        Raises:
            ValueError: tokens that don't fill the grid.
        """
        height, width = size
        check_shape("tokens", tokens, (None, height * width, self.q.in_features), f"for a {height} x {width} grid")
        query = self._heads(self.q(tokens), 1)[0]
        source = tokens
        if self.sr_ratio > 1:
            grid = tokens.mT.unflatten(2, size)
            source = self.norm(self.sr(grid).flatten(2).mT)
        key, value = self._heads(self.kv(source), 2)
        logits = None
        if return_logits:
            logits = query @ key.mT  # (B, heads, N, M)
            mixed = (logits * query.shape[-1] ** -0.5).softmax(-1) @ value
            if self.sr_ratio > 1:
                logits = self._pool_queries(logits, size)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2)), logits

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts D) to ``parts`` tensors (B, heads, N, d)."""
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _pool_queries(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        batch, heads, _, keys = logits.shape
        by_key = logits.permute(0, 1, 3, 2).reshape(batch * heads, keys, *size)
        pooled = F.avg_pool2d(by_key, self.sr_ratio).flatten(2)  # (B heads, M keys, M queries)
        return pooled.mT.reshape(batch, heads, -1, keys)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"


class MixTransformerOutput(NamedTuple):
    """What :class:`MixTransformer` returns.

    Attributes:
        features: (B, D_i, h_i, w_i) of each stage, from fine to coarse.
        attentions: attention logits (B, heads, N, N) of the last blocks, in their order.
        grid: (h, w), the last stage's grid, N = h w cells of the attention (before spatial reduction).
    """

    features: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    grid: tuple[int, int]


class MixTransformer(nn.Module):
    """Hierarchical transformer encoder with overlapping patches and no position embedding: MiT-B0 to B5.

    Args:
        embed_dims: channels of the stages: (64, 128, 320, 512) for B1 to B5, (32, 64, 160, 256) for B0.
        depths: blocks of the stages: (2, 2, 2, 2) for B0 and B1, (3, 4, 6, 3) for B2.
        num_heads: heads of the stages.
        sr_ratios: spatial reduction of the stages' attention.
        strides: strides of the patch embeddings: (4, 2, 2, 1) for AFA, whose last grid has stride 16; (4, 2, 2, 2) for
            SegFormer.
        mlp_ratio: width of the hidden layers.
        drop_path: largest probability of dropping a block, reached in the last one.
        export: number of last blocks whose attention logits are returned.

    Shapes:
        images (B, 3, H, W) -> features of ceil(H / s) by ceil(W / s) cells, s = 4, 8, 16 and 16 with AFA's strides.

    Raises:
        ValueError: sequences of another length than four, or more exported blocks than the last stage has.

    Paper:
        Xie et al., NeurIPS 2021, arXiv:2105.15203; with the strides and the export of Ru et al., CVPR 2022,
        arXiv:2203.02664.

    Notes:
        AFA reads the last two blocks only, while the released code exports, and stores, the attention of all; here the
        others run fused. Layer norms have eps 1e-6 in blocks and after stages, 1e-5 in embeddings and reductions.

    Example:
        >>> import torch
        >>> from wsss_modules import MixTransformer
        >>> net = MixTransformer((8, 16, 24, 32), (1, 1, 1, 2), num_heads=(1, 2, 3, 4), export=2).eval()
        >>> out = net(torch.rand(1, 3, 50, 64))
        >>> [tuple(x.shape[1:]) for x in out.features], [tuple(a.shape) for a in out.attentions]
        ([(8, 13, 16), (16, 7, 8), (24, 4, 4), (32, 4, 4)], [(1, 4, 16, 16), (1, 4, 16, 16)])
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        *,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        strides: Sequence[int] = (4, 2, 2, 1),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        export: int = 2,
    ) -> None:
        super().__init__()
        lists = {
            "embed_dims": embed_dims,
            "depths": depths,
            "num_heads": num_heads,
            "sr_ratios": sr_ratios,
            "strides": strides,
        }
        for name, values in lists.items():
            if len(values) != 4:
                raise ValueError(f"{name}: expected one number for each of 4 stages, got {tuple(values)}")
        if not 0 <= export <= depths[-1]:
            raise ValueError(f"export: expected 0 to {depths[-1]} blocks of the last stage, got {export}")
        self.embed_dims, self.strides, self.export = tuple(embed_dims), tuple(strides), export
        self.num_maps = export * num_heads[-1]
        inside, drops = 3, torch.linspace(0, drop_path, sum(depths), dtype=torch.float64).tolist()
        for i in range(4):
            patch = 7 if i == 0 else 3
            self.add_module(f"patch_embed{i + 1}", _PatchEmbed(inside, embed_dims[i], patch, strides[i]))
            blocks = [
                _Block(embed_dims[i], num_heads[i], sr_ratios[i], mlp_ratio, drops.pop(0)) for _ in range(depths[i])
            ]
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(embed_dims[i], eps=1e-6))
            inside = embed_dims[i]
        self.apply(_initialise)

    def forward(self, images: Tensor) -> MixTransformerOutput:
        """Encode images (B, 3, H, W), see the class."""
        check_shape("images", images, (None, 3, None, None), "(B, 3, H, W)")
        x, features, attentions, size = images, [], [], (0, 0)
        for i in range(1, 5):
            tokens, size = self.get_submodule(f"patch_embed{i}")(x)
            blocks = list(self.get_submodule(f"block{i}").children())
            for j, block in enumerate(blocks):
                wanted = i == 4 and j >= len(blocks) - self.export
                tokens, logits = block(tokens, size, wanted)
                if wanted:
                    attentions.append(logits)
            tokens = self.get_submodule(f"norm{i}")(tokens)
            x = tokens.mT.unflatten(2, size)
            features.append(x)
        return MixTransformerOutput(tuple(features), tuple(attentions), size)

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a released checkpoint of SegFormer's encoder (ImageNet) or of AFA; heads in it are left out.

        Args:
            state: the released ``state_dict``, with or without the prefixes ``module.`` and ``encoder.``.

        Raises:
            RuntimeError: a parameter is missing or has a wrong shape.
        """
        named = {key.removeprefix("module.").removeprefix("encoder."): value for key, value in state.items()}
        own = self.state_dict()
        self.load_state_dict({key: value for key, value in named.items() if key in own})


class _PatchEmbed(nn.Module):
    """Overlapping patches: convolution and layer norm."""

    def __init__(self, inside: int, out: int, patch: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inside, out, patch, stride, patch // 2)
        self.norm = nn.LayerNorm(out, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = self.proj(x)
        return self.norm(grid.flatten(2).mT), (grid.shape[2], grid.shape[3])


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = EfficientSelfAttention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MixFFN(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(
        self, tokens: Tensor, size: tuple[int, int], return_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        mixed, logits = self.attn(self.norm1(tokens), size, return_logits=return_logits)
        tokens = tokens + self._maybe(mixed)
        return tokens + self._maybe(self.mlp(self.norm2(tokens), size)), logits

    def _maybe(self, x: Tensor) -> Tensor:
        """Drop the branch of whole images in training."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * (torch.rand(len(x), 1, 1, device=x.device) < keep).to(x.dtype) / keep


class _MixFFN(nn.Module):
    """Two layers with a depth-wise 3 x 3 convolution between them, which tells cells where they are."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        grid = self.fc1(tokens).mT.unflatten(2, size)
        return self.fc2(F.gelu(self.dwconv["dwconv"](grid).flatten(2).mT))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
