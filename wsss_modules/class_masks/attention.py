"""Attention over all places of all images of a group, class by class, and the whole head of EDAM.

Axes: B = G n images in G groups of n that share a class, K foreground classes, S of them sampled, C feature channels,
d channels of tokens, h heads, H W cells, N = H*W, T = n*N tokens of a group, E blocks kept in one module.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.class_masks.masks import (
    DiscriminativeActivationLayer,
    Normalization,
    class_specific_features,
    keys_of_images,
)

__all__ = [
    "CollaborativeMultiAttention",
    "EDAMHead",
    "EDAMOutput",
    "ImagePositionEmbedding",
    "PreNormTransformerBlock",
]


class ImagePositionEmbedding(nn.Module):
    r"""Tell tokens at which cell of which image of their group they lie.

    .. math:: y = \mathrm{dropout}(x + PE_p + SEG_j)

    with fixed waves :math:`PE_{p,2i} = \sin(p\,10^{-8i/d})`, :math:`PE_{p,2i+1} = \cos(p\,10^{-8i/d})` of the index p
    of the cell, row by row, and a learnt vector for image j of the group.

    Args:
        width: d, width of the tokens.
        max_images: Rows of the table of images.
        dropout: Probability.

    Shapes:
        (..., n, S, N, d) tokens of n images -> the same.

    Raises:
        ValueError: tokens of another width, or of more images than the table has.

    Paper:
        Wu et al., CVPR 2021.

    Differences:
        The released code stores the waves for 46 x 46 cells exactly, so that another crop fails; here they are
        computed for the cells at hand (in float32, whatever the dtype), and are not in the ``state_dict``.

    Notes:
        Both terms are added by broadcasting. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> embed = ImagePositionEmbedding(8).eval()
        >>> embed(torch.zeros(2, 3, 20, 8)).shape
        torch.Size([2, 3, 20, 8])
    """

    def __init__(self, width: int, max_images: int = 5, dropout: float = 0.1) -> None:
        super().__init__()
        self.segment = nn.Embedding(max_images, width)
        nn.init.xavier_uniform_(self.segment.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Add both embeddings, see the class."""
        images, width = self.segment.weight.shape
        if tokens.ndim < 4 or tokens.shape[-1] != width:
            raise ValueError(f"tokens: expected shape (..., n, S, N, {width}), got {tuple(tokens.shape)}")
        if tokens.shape[-4] > images:
            raise ValueError(f"tokens: expected at most max_images = {images} images, got {tokens.shape[-4]}")
        segment = self.segment.weight[: tokens.shape[-4], None, None]  # (n, 1, 1, d)
        return self.dropout(tokens + self.positions(tokens.shape[-2]) + segment)

    def positions(self, cells: int) -> Tensor:
        """The waves at ``cells`` cells, (N, d)."""
        weight = self.segment.weight
        width = weight.shape[1]
        index = torch.arange(cells, device=weight.device, dtype=torch.float32)
        pairs = torch.arange(0, width, 2, device=weight.device, dtype=torch.float32)
        angles = index[:, None] * torch.exp(pairs * -(math.log(10000.0) / width))  # (N, ceil(d / 2))
        waves = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
        return waves[:, :width].to(weight.dtype)


class PreNormTransformerBlock(nn.Module):
    r"""Self-attention and a two-layer network, each behind a normalisation and beside a residual.

    .. math::
        y = x + \mathrm{attention}(\mathrm{norm}_1(x)), \qquad z = y + W_2\,\mathrm{gelu}(W_1\,\mathrm{norm}_2(y))

    with :math:`\mathrm{norm}(x) = a (x - \bar x) / (\sigma + \epsilon) + b` and dropout on the attention weights, on
    both residual branches, within the second one and on the result.

    Args:
        width: d, channels in and out.
        heads: h, parts of the channels that attend on their own; divides d.
        hidden: Width of the hidden layer; default 4 d.
        dropout: Probability.
        num_blocks: E, independent blocks kept in one module, for tokens of E kinds at once.

    Shapes:
        x (B, T, d) -> the same; or x (B, S, T, d) and ``block`` (S,) or (B, S) int64, 0..E-1: which block takes which
        tokens.

    Raises:
        ValueError: ``heads`` that don't divide ``width``, or a wrong shape.

    Paper:
        Wu et al., CVPR 2021.

    Differences:
        As released, :math:`\sigma` is the unbiased deviation (divisor d - 1) and :math:`\epsilon` = 1e-6 is added to
        it, which is not `torch.nn.LayerNorm`; gelu is its tanh form. The released code keeps E blocks in a Python list
        and calls them one after the other.

    Notes:
        Scores of T x T are never kept by fused kernels of ``scaled_dot_product_attention``: memory grows with T d, not
        with T^2. All blocks run in one call. Norms are in float32 for half precision. Weights start Xavier uniform,
        each matrix by itself, biases as torch's linear layers. Under DDP a block that took no token has a gradient of
        zeros, so that no parameter counts as unused. Compiles with ``fullgraph=True``.

    Example:
        >>> block = PreNormTransformerBlock(8, heads=2, num_blocks=20).eval()
        >>> block(torch.rand(3, 4, 10, 8), torch.tensor([7, 0, 19, 3])).shape
        torch.Size([3, 4, 10, 8])
    """

    def __init__(
        self,
        width: int = 128,
        heads: int = 2,
        hidden: int | None = None,
        dropout: float = 0.1,
        *,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
        self.width, self.heads, self.hidden = width, heads, hidden or 4 * width
        self.dropout, self.num_blocks = dropout, num_blocks
        for name, rows, columns in (
            ("qkv", 3 * width, width),
            ("out", width, width),
            ("inner", self.hidden, width),
            ("outer", width, self.hidden),
        ):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(num_blocks, rows, columns)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_blocks, rows)))
        for name in ("norm1", "norm2"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(num_blocks, width)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(num_blocks, width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: see the notes of the class."""
        with torch.no_grad():
            for name in ("qkv", "out", "inner", "outer"):
                weight = self.get_parameter(f"{name}_weight")
                for matrix in weight.unflatten(1, (3 if name == "qkv" else 1, -1)).flatten(0, 1):
                    nn.init.xavier_uniform_(matrix)
                bound = weight.shape[2] ** -0.5
                self.get_parameter(f"{name}_bias").uniform_(-bound, bound)
            for name in ("norm1", "norm2"):
                self.get_parameter(f"{name}_weight").fill_(1)
                self.get_parameter(f"{name}_bias").zero_()

    def forward(self, x: Tensor, block: Tensor | None = None) -> Tensor:
        """Attend and transform, see the class."""
        if block is None:
            if self.num_blocks > 1:
                raise ValueError(f"block: expected the blocks of x, one of {self.num_blocks} for each, got None")
            check_shape("x", x, (None, None, self.width), "for this block")
            first = torch.zeros(1, dtype=torch.int64, device=x.device)
            return self._transform(x[:, None], first)[:, 0]
        check_integer("block", block)
        check_shape("x", x, (None, None, None, self.width), "for this block")
        if tuple(block.shape) != (x.shape[1],):
            check_shape("block", block, x.shape[:2], f"to match x, or ({x.shape[1]},)")
        return self._transform(x, block)

    def _transform(self, x: Tensor, block: Tensor) -> Tensor:
        attended = self._linear("out", self._attention(self._norm("norm1", x, block), block), block)
        x = x + self._drop(attended)
        inner = F.gelu(self._linear("inner", self._norm("norm2", x, block), block), approximate="tanh")
        x = x + self._drop(self._linear("outer", self._drop(inner), block))
        return self._drop(x)

    def _attention(self, x: Tensor, block: Tensor) -> Tensor:
        parts = rearrange(self._linear("qkv", x, block), "b s t (p h c) -> p (b s) h t c", p=3, h=self.heads)
        q, k, v = parts.unbind()
        read = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return rearrange(read, "(b s) h t c -> b s t (h c)", b=x.shape[0])

    def _linear(self, name: str, x: Tensor, block: Tensor) -> Tensor:
        """Tokens (B, S, T, in) through the matrices of their blocks: (B, S, T, out)."""
        return torch.matmul(x, self._of(f"{name}_weight", block).mT) + self._of(f"{name}_bias", block)[..., None, :]

    def _norm(self, name: str, x: Tensor, block: Tensor) -> Tensor:
        values = at_least_float32(x)
        centred = values - values.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / max(1, self.width - 1)
        # the slope of a root at 0 is infinite: a constant token is selected before it
        deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        weight, bias = (self._of(f"{name}_{part}", block)[..., None, :] for part in ("weight", "bias"))
        return (weight * (centred / (deviation + 1e-6)) + bias).to(x.dtype)

    def _of(self, name: str, block: Tensor) -> Tensor:
        """A parameter's rows for ``block``: (*block.shape, ...)."""
        parameter: Tensor = getattr(self, name)  # get_parameter refuses what functional_call puts in its place
        return parameter.index_select(0, block.flatten()).unflatten(0, block.shape)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"width={self.width}, heads={self.heads}, hidden={self.hidden}, dropout={self.dropout}, "
            f"num_blocks={self.num_blocks}"
        )


class CollaborativeMultiAttention(nn.Module):
    """For each sampled class, let all places of all images of a group attend to each other; classify each image.

    A class has a transformer block and a classifier of its own; the embedding is shared. The tokens of a class are its
    class-specific features at all cells of all images of the group, so that images that share the class support each
    other. The tokens of an image are then averaged and give one logit.

    Args:
        num_classes: K, foreground classes.
        width: d, channels of the tokens.
        heads: Heads of the attention.
        layers: Blocks one after the other.
        hidden: Width of the hidden layer of a block; default 4 d.
        dropout: Probability, everywhere.
        max_images: Most images of a group.
        pool: Average the features over squares of this many cells first; 2 makes attention 16 times cheaper.

    Raises:
        ValueError: a number below 1, or ``heads`` that don't divide ``width``.

    Paper:
        Wu et al., Embedded Discriminative Attention Mechanism for Weakly Supervised Semantic Segmentation, CVPR 2021.

    Differences:
        The released code takes exactly one pair of images at a time, all 20 classes and 46 x 46 cells. ``pool`` is
        not in it.

    Notes:
        All classes of all groups run as one batch; see `PreNormTransformerBlock` for memory. A logit depends on the
        class features, block and classifier of its class only. Compiles with ``fullgraph=True``.

    Example:
        >>> attend = CollaborativeMultiAttention(20, width=8).eval()
        >>> keys = torch.tensor([[3, 7, 20], [1, 2, 3]])  # of two pairs of images
        >>> attend(torch.rand(4, 3, 8, 5, 6), keys).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 128,
        heads: int = 2,
        layers: int = 1,
        *,
        hidden: int | None = None,
        dropout: float = 0.1,
        max_images: int = 5,
        pool: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("layers", layers),
            ("max_images", max_images),
            ("pool", pool),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.width, self.pool = width, pool
        self.embedding = ImagePositionEmbedding(width, max_images, dropout)
        self.blocks = nn.ModuleList(
            PreNormTransformerBlock(width, heads, hidden, dropout, num_blocks=num_classes) for _ in range(layers)
        )
        self.classifier = nn.Parameter(torch.empty(num_classes, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, class_features: Tensor, keys: Tensor) -> Tensor:
        """Classify every image under the mask of every sampled class.

        Args:
            class_features: (B, S, d, H, W) floating point, see `class_specific_features`.
            keys: (S,) int64 classes 1..K: all images are one group; or (G, S): each row is that of B / G images that
                follow each other.

        Returns:
            logits (B, S): whether image b shows class keys[b's group, s].

        Raises:
            TypeError: a tensor of the wrong kind.
            ValueError: a wrong shape, or a batch that is no multiple of G.
        """
        check_ndim("class_features", class_features, 5, "(B, S, d, H, W)")
        check_floating("class_features", class_features)
        check_shape("class_features", class_features, (None, None, self.width, None, None), "for this module")
        groups = keys if keys.ndim == 2 else keys[None]
        keys_of_images(keys, len(class_features))
        check_shape("keys", groups, (None, class_features.shape[1]), "to match class_features")
        if self.pool > 1:
            flat = F.avg_pool2d(class_features.flatten(0, 1), self.pool, ceil_mode=True)
            class_features = flat.unflatten(0, class_features.shape[:2])
        tokens = rearrange(class_features, "(g n) s d h w -> g n s (h w) d", g=len(groups))
        images, cells = tokens.shape[1], tokens.shape[3]
        tokens = rearrange(self.embedding(tokens), "g n s p d -> g s (n p) d")
        for block in self.blocks:
            tokens = block(tokens, groups - 1)
        pooled = rearrange(tokens, "g s (n p) d -> g n s p d", n=images, p=cells).mean(3)
        weight = self.classifier.index_select(0, groups.flatten() - 1).unflatten(0, groups.shape)  # (G, S, d)
        return (pooled * weight[:, None]).sum(-1).flatten(0, 1)


class EDAMOutput(NamedTuple):
    """What `EDAMHead` returns.

    Attributes:
        logits: (B, S) whether an image shows each sampled class.
        scores: (B, 1+K, H, W) masks in [0, 1], background first; the localisation maps.
    """

    logits: Tensor
    scores: Tensor


class EDAMHead(nn.Module):
    """Masks, features seen through them, attention within groups of images, and logits: all of EDAM on a backbone.

    How does attention get from d back to C channels? It never does. The C = 4096 channels of the backbone are seen by
    two layers only: the masks come from them by a 3 x 3 convolution, and one 1 x 1 convolution without bias projects
    them to d = 128, the same for all classes. The mask multiplies the *projected* features; that is the same as
    projecting the masked ones, as the paper has it, since the projection is linear, has no bias and works on each cell
    by itself. From there on all has d channels: tokens, queries, keys, values (two heads of 64 joined to 128), the
    output layer, the residual, and the classifier, which takes the mean token of an image from d to 1. Nothing is ever
    multiplied with, or added to, the C-channel map again.

    Args:
        in_channels: C, channels of the features.
        num_classes: K, foreground classes.
        width: d, width of the tokens.
        heads: Heads of the attention.
        layers: Blocks one after the other.
        normalization: Of the masks, see `discriminative_activation`.
        hidden: Width of the hidden layer of a block; default 4 d.
        dropout: Probability, everywhere in the attention.
        max_images: Most images of a group.
        pool: See `CollaborativeMultiAttention`.

    Shapes:
        features (B, C, H, W) and keys (S,) or (G, S) -> `EDAMOutput`.

    Raises:
        ValueError: an unknown option, or features without C channels.

    Paper:
        Wu, Huang, Gao, Wei, Wei, Zhang and Shen, Embedded Discriminative Attention Mechanism for Weakly Supervised
        Semantic Segmentation, CVPR 2021.

    Differences:
        See the parts. The released backbone gives features before the last ReLU, which may be negative.

    Notes:
        Only ``activation`` is used at test time. Train with `wsss_losses.edam_loss`; classes of a step come from
        `sample_class_keys`, pairs of images from `draw_shared_class_pairs`. Compiles with ``fullgraph=True``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = EDAMHead(16, num_classes=3, width=8)
        >>> out = head(torch.randn(2, 16, 5, 7), torch.tensor([2, 1, 3]))  # a pair of images, three classes
        >>> out.logits.shape, out.scores.shape
        (torch.Size([2, 3]), torch.Size([2, 4, 5, 7]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int = 128,
        heads: int = 2,
        layers: int = 1,
        *,
        normalization: Normalization = "l2_abs",
        hidden: int | None = None,
        dropout: float = 0.1,
        max_images: int = 5,
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.activation = DiscriminativeActivationLayer(in_channels, num_classes, normalization=normalization)
        self.project = nn.Conv2d(in_channels, width, 1, bias=False)
        self.attention = CollaborativeMultiAttention(
            num_classes, width, heads, layers, hidden=hidden, dropout=dropout, max_images=max_images, pool=pool
        )

    def forward(self, features: Tensor, keys: Tensor) -> EDAMOutput:
        """Masks and logits, see the class."""
        scores = self.activation(features)
        seen = class_specific_features(self.project(features), scores, keys)
        return EDAMOutput(self.attention(seen, keys), scores)
