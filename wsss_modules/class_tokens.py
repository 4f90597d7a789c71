"""One class token per class, and the maps that its attention draws (MCTformer V1, V2 and MCTformer+).

Axes: B images, K foreground classes, P tokens before the patches (the first K of them class tokens), N patches on a
grid of h by w, T = P + N, D channels, L blocks, J heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.pooling.global_rank import GlobalWeightedRankPool
from wsss_modules.tokens import (
    TokenEncoder,
    attention_probabilities,
    interpolate_pos_embed,
    query_key,
    tokens_to_map,
)

__all__ = [
    "AttentionSums",
    "ClassTokenPool",
    "LocalizedClasses",
    "MultiClassTokenOutput",
    "MultiClassTokenViT",
    "PatchCAMHead",
    "PatchCAMOutput",
    "class_to_patch_attention",
    "expand_class_token_checkpoint",
    "fuse_attention_cam",
    "patch_to_patch_attention",
]

Reduce = Literal["sum", "mean"]
Mode = Literal["fused", "patchcam", "mct"]
Variant = Literal["v1", "v2", "plus"]


def class_to_patch_attention(
    attention: Tensor | Sequence[Tensor],
    num_classes: int,
    n_layers: int = 3,
    *,
    num_prefix: int | None = None,
    reduce: Reduce = "sum",
) -> Tensor:
    r"""Cut the attention of the class tokens to the patches out of the last blocks: a map for each class.

    .. math:: a_{k} = \sum_{l > L - n} \frac{1}{J} \sum_j A_{l,j}[k, P:]

    Args:
        attention: A, (L, B, J, T, T) or L tensors (B, J, T, T), softmaxed, queries in rows, class tokens first.
        num_classes: K, foreground classes.
        n_layers: n, how many blocks from the last one; 3 in the published runs. More than L means all.
        num_prefix: P, where other tokens follow the class tokens before the patches; default K.
        reduce: "sum" over the blocks (V1, V2) or their "mean" (MCTformer+, and the text of the paper).

    Returns:
        (B, K, N), at least 0, in at least float32; ``.unflatten(2, grid)`` makes maps of it.

    Raises:
        ValueError: a wrong shape or option.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, section 3.3.

    Differences:
        The paper averages over the blocks, the released code sums: a factor, which min-max normalisation removes.

    Notes:
        For whole networks use `AttentionSums`, which never holds A.

    Example:
        >>> attention = torch.full((2, 1, 1, 6, 6), 1 / 6)  # two class tokens, four patches
        >>> class_to_patch_attention(attention, 2)
        tensor([[[0.3333, 0.3333, 0.3333, 0.3333],
                 [0.3333, 0.3333, 0.3333, 0.3333]]])
    """
    prefix = _check_layers(attention, num_classes, num_prefix)
    if n_layers < 1 or reduce not in ("sum", "mean"):
        raise ValueError(f'n_layers, reduce: expected at least 1 and "sum" or "mean", got {n_layers} and {reduce!r}')
    last = list(attention)[-n_layers:]
    total = torch.stack([at_least_float32(layer[:, :, :num_classes, prefix:]).mean(1) for layer in last]).sum(0)
    return total if reduce == "sum" else total / len(last)


def patch_to_patch_attention(
    attention: Tensor | Sequence[Tensor], num_prefix: int, *, reduce: Literal["sum", "mean", "none"] = "sum"
) -> Tensor:
    """Cut the attention between patches out of all blocks, averaged over heads.

    Args:
        attention: (L, B, J, T, T) or L tensors (B, J, T, T), softmaxed, queries in rows.
        num_prefix: P tokens before the patches; the number of classes in MCTformer.
        reduce: "sum" or "mean" over the blocks, or "none".

    Returns:
        (B, N, N), or (L, B, N, N) with "none", in at least float32. Rows sum to less than 1 for each block: what goes
        to the tokens before the patches is left out and not made up for.

    Raises:
        ValueError: a wrong shape or option.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, section 3.4.

    Notes:
        For whole networks use `AttentionSums`, which never holds the attention of all blocks and heads.

    Example:
        >>> patch_to_patch_attention(torch.full((2, 1, 1, 3, 3), 1 / 3), num_prefix=1)
        tensor([[[0.6667, 0.6667],
                 [0.6667, 0.6667]]])
    """
    prefix = _check_layers(attention, 0, num_prefix)
    if reduce not in ("sum", "mean", "none"):
        raise ValueError(f'reduce: expected "sum", "mean" or "none", got {reduce!r}')
    layers = torch.stack([at_least_float32(layer[:, :, prefix:, prefix:]).mean(1) for layer in attention])
    return layers if reduce == "none" else layers.sum(0) if reduce == "sum" else layers.mean(0)


def _check_layers(attention: Tensor | Sequence[Tensor], num_classes: int, num_prefix: int | None) -> int:
    prefix = num_classes if num_prefix is None else num_prefix
    if len(attention) == 0:
        raise ValueError("attention: expected at least one block, got none")
    for layer in attention:
        check_ndim("attention", layer, 4, "(B, J, T, T) for each block")
        check_shape("attention", layer, attention[0].shape, "for each block")
        check_shape("attention", layer, (None, None, layer.shape[3], layer.shape[2]), "with as many rows as columns")
    tokens = attention[0].shape[3]
    if not 0 <= num_classes <= prefix < tokens:
        raise ValueError(
            f"num_classes, num_prefix: expected class tokens, then patches among {tokens} tokens, "
            f"got {num_classes} class tokens and {prefix} before the patches"
        )
    return prefix


class AttentionSums:
    """Sums the attention of a transformer while it runs: class tokens to patches, and patches among each other.

    Give it to ``TokenEncoder.forward(images, visit=sums)``, or call it with the number, the module and the input of
    each block. It computes what it keeps from the queries and keys, head by head, so that memory is O(N^2) an image,
    where a stack of all blocks and heads takes L * J = 72 times as much in DeiT-S.

    Args:
        depth: L, blocks.
        num_class_tokens: K, the first tokens.
        n_layers: How many blocks from the last one count for the class tokens.
        num_prefix: P; default K.
        affinity: Whether to sum the attention between patches, over all blocks.

    Attributes:
        class_to_patch: (B, K, N), `class_to_patch_attention` with "sum".
        patch_to_patch: (B, N, N), `patch_to_patch_attention` with "sum"; None without ``affinity``.

    Raises:
        ValueError: impossible counts.

    Notes:
        Differentiable where gradients are enabled. Use a new one for every batch. The same sums to 1e-6 as from the
        stack, in float32 whatever the dtype of the network.

    Example:
        >>> from wsss_modules import TokenEncoder, TransformerBlock
        >>> blocks = [TransformerBlock(24, 3) for _ in range(4)]
        >>> encoder = TokenEncoder(nn.Conv2d(3, 24, 16, 16), blocks, 24, num_prefix=5, grid=(2, 2))
        >>> sums = AttentionSums(depth=4, num_class_tokens=5)
        >>> out = encoder(torch.rand(1, 3, 32, 48), visit=sums)
        >>> sums.class_to_patch.shape, sums.patch_to_patch.shape
        (torch.Size([1, 5, 6]), torch.Size([1, 6, 6]))
    """

    class_to_patch: Tensor
    patch_to_patch: Tensor | None

    def __init__(
        self,
        depth: int,
        num_class_tokens: int,
        *,
        n_layers: int = 3,
        num_prefix: int | None = None,
        affinity: bool = True,
    ) -> None:
        self.num_prefix = num_class_tokens if num_prefix is None else num_prefix
        if depth < 1 or n_layers < 1 or not 0 <= num_class_tokens <= self.num_prefix:
            raise ValueError(
                "depth, n_layers, num_class_tokens, num_prefix: expected at least 1, 1, 0 and no fewer than the class "
                f"tokens, got {depth}, {n_layers}, {num_class_tokens} and {self.num_prefix}"
            )
        self.depth, self.num_class_tokens, self.n_layers, self.affinity = depth, num_class_tokens, n_layers, affinity
        self._class: Tensor | None = None
        self.patch_to_patch = None

    def __call__(self, layer: int, block: nn.Module, tokens: Tensor) -> None:
        """Add the attention of a block that is about to get ``tokens`` (B, T, D)."""
        late = layer >= self.depth - self.n_layers
        if not late and not self.affinity:
            return
        query, key = query_key(block, tokens)
        if late:
            rows = query[:, :, : self.num_class_tokens]
            self._class = _add_heads(self._class, rows, key, self.num_prefix)
            self.class_to_patch = self._class
        if self.affinity:
            rows = query[:, :, self.num_prefix :]
            self.patch_to_patch = _add_heads(self.patch_to_patch, rows, key, self.num_prefix)


def _add_heads(total: Tensor | None, query: Tensor, key: Tensor, num_prefix: int) -> Tensor:
    """Add the mean over heads of the attention to the patches: (B, rows, N)."""
    share = 1 / query.shape[1]
    for q, k in zip(query.unbind(1), key.unbind(1), strict=True):
        weights = attention_probabilities(q, k)[..., num_prefix:]
        if total is None:
            total = weights * share
        else:
            total = total.add(weights, alpha=share) if weights.requires_grad else total.add_(weights, alpha=share)
    assert total is not None  # for mypy: a block has heads
    return total


def fuse_attention_cam(attention: Tensor, cam: Tensor | None, mode: Mode = "fused", *, root: bool = False) -> Tensor:
    r"""Join the maps of the class tokens with those of the patch tokens: :math:`a \cdot relu(m)`.

    Args:
        attention: a, (B, K, h, w), at least 0.
        cam: m, (B, K, h, w), signed; may be None for "mct".
        mode: "fused" is the product, "patchcam" :math:`relu(m)` alone, "mct" a alone.
        root: Take the square root of the product, as MCTformer+.

    Returns:
        (B, K, h, w), at least 0. Gradients flow into both; the root has none where the product is 0.

    Raises:
        ValueError: shapes differ, a map is missing, or an unknown ``mode``.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, eq. 5; MCTformer+, 2023, arXiv:2308.03005.

    Differences:
        The paper normalises the maps before the product, the released code does not; nor is it done here. In the
        released V2 a misspelt mode silently gives the map of "mct".

    Example:
        >>> attention, cam = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[2.0, -1.0]]]])
        >>> fuse_attention_cam(attention, cam), fuse_attention_cam(attention, cam, root=True)
        (tensor([[[[1., 0.]]]]), tensor([[[[1., 0.]]]]))
    """
    if mode not in ("fused", "patchcam", "mct"):
        raise ValueError(f'mode: expected "fused", "patchcam" or "mct", got {mode!r}')
    check_ndim("attention", attention, 4, "(B, K, h, w)")
    if mode == "mct":
        return attention
    if cam is None:
        raise ValueError(f'cam: expected maps of the patches for mode {mode!r}, got None; "mct" does without')
    check_shape("cam", cam, attention.shape, "to match attention")
    if mode == "patchcam":
        return F.relu(cam)
    product = attention * F.relu(cam)
    if not root:
        return product
    positive = product > 0  # selected first: the slope of the root at 0 is infinite
    return torch.where(positive, torch.where(positive, product, 1).sqrt(), 0)


class ClassTokenPool(nn.Module):
    """Score of a class: the mean over the channels of its own token, so that no classifier can mix the classes.

    Shapes:
        class tokens (B, K, D) -> logits (B, K).

    Raises:
        ValueError: a wrong shape.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, section 3.2.

    Example:
        >>> ClassTokenPool()(torch.tensor([[[1.0, 3.0], [0.0, -2.0]]]))
        tensor([[ 2., -1.]])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Score tokens, see the class."""
        check_ndim("class_tokens", class_tokens, 3, "(B, K, D)")
        return at_least_float32(class_tokens).mean(2).to(class_tokens.dtype)


class PatchCAMOutput(NamedTuple):
    """What `PatchCAMHead` returns.

    Attributes:
        cam: (B, K, h, w) class maps, signed.
        logits: (B, K) class scores of the image.
    """

    cam: Tensor
    logits: Tensor


class PatchCAMHead(nn.Module):
    """Class maps of patch tokens by a 3 x 3 convolution on their grid, and their pooled scores.

    Args:
        dim: D, width of the tokens.
        num_classes: K, foreground classes.
        pool: Maps (B, K, h, w) to scores (B, K); default: the mean of the signed map (V2). MCTformer+ takes
            `GlobalWeightedRankPool`.

    Shapes:
        patches (B, N, D), grid (h, w) -> `PatchCAMOutput`.

    Raises:
        ValueError: a wrong shape.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, section 3.3.

    Notes:
        Works on the patches of any backbone. There is no ReLU before the pooling: evidence against a class counts.

    Example:
        >>> head = PatchCAMHead(24, num_classes=20)
        >>> out = head(torch.rand(2, 15, 24), (3, 5))
        >>> out.cam.shape, out.logits.shape
        (torch.Size([2, 20, 3, 5]), torch.Size([2, 20]))
    """

    def __init__(self, dim: int, num_classes: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.pool = pool

    def forward(self, patches: Tensor, grid: Sequence[int]) -> PatchCAMOutput:
        """Map and score classes, see the class."""
        cam = self.conv(tokens_to_map(patches, grid))
        return PatchCAMOutput(cam, cam.mean((2, 3)) if self.pool is None else self.pool(cam))


class MultiClassTokenOutput(NamedTuple):
    """What `MultiClassTokenViT` returns.

    Attributes:
        class_logits: (B, K) scores of the class tokens.
        patch_logits: (B, K) scores of the patch tokens; None in V1.
        cam: (B, K, h, w) signed maps of the patch tokens; None in V1.
        class_tokens: (B, K, D), or (L, B, K, D) after each block for the contrast of MCTformer+.
        patches: (B, N, D).
        grid: (h, w).
    """

    class_logits: Tensor
    patch_logits: Tensor | None
    cam: Tensor | None
    class_tokens: Tensor
    patches: Tensor
    grid: tuple[int, int]

    @property
    def logits(self) -> Tensor:
        """The scores to decide by, (B, K), the mean of both kinds."""
        return self.class_logits if self.patch_logits is None else (self.class_logits + self.patch_logits) / 2


class LocalizedClasses(NamedTuple):
    """What `localize` of a `MultiClassTokenViT` returns.

    Attributes:
        cam: (B, K, h, w) maps, at least 0, neither refined nor normalised.
        affinity: (B, N, N) attention between patches summed over blocks, for `refine_with_patch_affinity`.
        output: what the network says besides.
    """

    cam: Tensor
    affinity: Tensor
    output: MultiClassTokenOutput


class MultiClassTokenViT(nn.Module):
    """Transformer with a class token for each class, whose attention to the patches localises the class.

    Args:
        encoder: Tokens of the image, K class tokens first: `token_encoder_from_vit` over timm's DeiT, or a
            `TokenEncoder` of any patches and blocks, as long as `query_key` can read the blocks.
        num_classes: K, foreground classes.
        variant: "v1" scores the class tokens alone; "v2" has maps of the patch tokens, averaged, beside them; "plus"
            (MCTformer+) pools these by rank, averages the attention and takes the root of the product.
        n_layers: How many blocks from the last one draw the maps of the class tokens.

    Shapes:
        images (B, 3, H, W) -> `MultiClassTokenOutput`.

    Raises:
        ValueError: an unknown ``variant``, fewer tokens than classes, or ``n_layers`` below 1.

    Paper:
        Xu, Ouyang, Bennamoun, Boussaid and Xu, Multi-class Token Transformer for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.02891; MCTformer+, 2023, arXiv:2308.03005.

    Differences:
        The released encoder has a last norm that it does not apply; here it does not exist (``final_norm=False``).

    Notes:
        Training never makes an attention matrix; `localize` sums them as the blocks run. All parameters take part in
        the loss, so that DDP needs no search for unused ones.

        The blocks of MiT convolve the patches on their grid, where a class token has no place: put a few
        `TransformerBlock` behind its last stage, as behind a convolutional network. Without class tokens,
        `PatchCAMHead` and, with the attention of blocks that `query_key` can read, `AttentionSums(depth, 0)` and
        `refine_with_patch_affinity` serve any backbone.

    Example:
        >>> from wsss_modules import TokenEncoder, TransformerBlock
        >>> blocks = [TransformerBlock(24, 3) for _ in range(4)]
        >>> encoder = TokenEncoder(nn.Conv2d(3, 24, 16, 16), blocks, 24, num_prefix=20, grid=(14, 14), pos_offset=0.1)
        >>> net = MultiClassTokenViT(encoder, num_classes=20)
        >>> found = net.localize(torch.rand(1, 3, 48, 80))
        >>> found.cam.shape, found.affinity.shape, found.output.class_logits.shape
        (torch.Size([1, 20, 3, 5]), torch.Size([1, 15, 15]), torch.Size([1, 20]))
    """

    def __init__(self, encoder: TokenEncoder, num_classes: int, variant: Variant = "v2", *, n_layers: int = 3) -> None:
        super().__init__()
        if variant not in ("v1", "v2", "plus"):
            raise ValueError(f'variant: expected "v1", "v2" or "plus", got {variant!r}')
        if not 1 <= num_classes <= encoder.num_prefix:
            raise ValueError(
                f"num_classes: expected 1 to {encoder.num_prefix}, the tokens before the patches, got {num_classes}"
            )
        if n_layers < 1:
            raise ValueError(f"n_layers: expected at least 1, got {n_layers}")
        self.encoder, self.num_classes, self.variant, self.n_layers = encoder, num_classes, variant, n_layers
        self.pool = ClassTokenPool()
        self.head: PatchCAMHead | None = None
        if variant != "v1":
            rank = GlobalWeightedRankPool() if variant == "plus" else None
            self.head = PatchCAMHead(encoder.pos_embed.shape[2], num_classes, rank)

    def forward(self, images: Tensor, *, visit: AttentionSums | None = None) -> MultiClassTokenOutput:
        """Score images, see the class; ``visit`` as in `TokenEncoder`."""
        tokens = self.encoder(images, visit=visit, layers=self.variant == "plus")
        last = tokens.prefix[:, : self.num_classes]
        cam, patch_logits = (None, None) if self.head is None else self.head(tokens.patches, tokens.grid)
        class_tokens = last if tokens.layers is None else tokens.layers[:, :, : self.num_classes]
        return MultiClassTokenOutput(self.pool(last), patch_logits, cam, class_tokens, tokens.patches, tokens.grid)

    def localize(self, images: Tensor, mode: Mode | None = None) -> LocalizedClasses:
        """Map the classes of images.

        Args:
            images: (B, 3, H, W).
            mode: See `fuse_attention_cam`; default: "fused", and "mct" in V1.

        Returns:
            The maps, and the affinity that refines them.
        """
        depth, prefix = len(self.encoder.blocks), self.encoder.num_prefix
        sums = AttentionSums(depth, self.num_classes, n_layers=self.n_layers, num_prefix=prefix)
        output = self(images, visit=sums)
        attention = sums.class_to_patch.unflatten(2, output.grid)
        if self.variant == "plus":
            attention = attention / min(self.n_layers, depth)
        mode = mode or ("mct" if self.head is None else "fused")
        cam = fuse_attention_cam(attention, output.cam, mode, root=self.variant == "plus")
        assert sums.patch_to_patch is not None  # for mypy: it was asked for
        return LocalizedClasses(cam, sums.patch_to_patch, output)

    @staticmethod
    def released_key(name: str) -> str | None:
        """The key in our ``state_dict`` of a parameter of the released V1 and V2, or of DeiT; None for what is unused.

        For an encoder whose patches come from one convolution. The last norm is not applied, and the head of V1 is
        never called.
        """
        first, _, rest = name.partition(".")
        if first == "norm":
            return None
        if first == "head":
            return f"head.conv.{rest}"
        moved = {"cls_token": "prefix", "patch_embed.proj.weight": "patch_embed.weight"}
        moved["patch_embed.proj.bias"] = "patch_embed.bias"
        return f"encoder.{moved.get(name, name)}"

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load released weights of V1 or V2, or those of `expand_class_token_checkpoint`, whose head stays as it is.

        Args:
            state: The tensors under their released names.

        Raises:
            RuntimeError: a tensor is missing, apart from the head's, or has another shape or no place.
        """
        ours = {self.released_key(name): value for name, value in state.items()}
        if self.head is None:
            ours = {key: value for key, value in ours.items() if key is None or not key.startswith("head.")}
        loaded = self.load_state_dict({key: value for key, value in ours.items() if key is not None}, strict=False)
        missing = [key for key in loaded.missing_keys if not key.startswith("head.")]
        if missing or loaded.unexpected_keys:
            raise RuntimeError(f"state: missing {missing}, without a place {loaded.unexpected_keys}")

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_classes={self.num_classes}, variant={self.variant!r}, n_layers={self.n_layers}"


def expand_class_token_checkpoint(
    state: Mapping[str, Tensor],
    num_classes: int,
    grid: Sequence[int],
    *,
    mode: Literal["size", "nearest"] = "size",
    source_grid: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Turn the weights of a ViT or DeiT into those of a network with a class token for each class.

    The class token and its position are repeated, so that all classes start alike: the loss tells them apart, since
    token k sees label k alone. Positions of the patches are resampled; weights of classifiers are left out.

    Args:
        state: ``cls_token`` (1, 1, D), ``pos_embed`` (1, 1 + N0, D) and all others, by timm's and DeiT's names. With K
            class tokens already, which is seen from the shapes, only the positions are resampled.
        num_classes: K, foreground classes.
        grid: (h, w) of the positions wanted.
        mode: "size": bicubic (V1, V2); "nearest": each row copied, over 2 x 2 cells for twice the grid (MCTformer+).
        source_grid: (h0, w0) stored; default: a square.

    Returns:
        A new dictionary with ``cls_token`` (1, K, D), ``pos_embed`` (1, K + h * w, D) and the others untouched.

    Raises:
        ValueError: a tensor is missing, or has a number of tokens or rows that is neither.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, section 4.1.

    Differences:
        The released code tells the two kinds of checkpoint by whether the path begins with "https", so that a local
        DeiT file is taken for one of several class tokens.

    Example:
        >>> state = {"cls_token": torch.rand(1, 1, 6), "pos_embed": torch.rand(1, 1 + 49, 6)}
        >>> {name: tuple(value.shape) for name, value in expand_class_token_checkpoint(state, 5, (4, 4)).items()}
        {'cls_token': (1, 5, 6), 'pos_embed': (1, 21, 6)}
    """
    missing = [name for name in ("cls_token", "pos_embed") if name not in state]
    if missing:
        raise ValueError(f"state: expected the weights of a vision transformer, {' and '.join(missing)} missing")
    token, positions = state["cls_token"], state["pos_embed"]
    check_floating("cls_token", token)
    check_ndim("cls_token", token, 3, "(1, 1 or K, D)")
    check_ndim("pos_embed", positions, 3, "(1, P + N0, D)")
    stored = token.shape[1]
    if num_classes < 1 or stored not in (1, num_classes):
        raise ValueError(f"cls_token: expected 1 token, or one for each of {num_classes} classes, got {stored}")
    others = sum(state[name].shape[1] for name in ("dist_token", "reg_token") if name in state)
    rows = interpolate_pos_embed(positions, stored + others, grid, mode=mode, source_grid=source_grid)
    copies = 1 if stored == num_classes else num_classes
    dropped = ("cls_token", "pos_embed", "dist_token", "reg_token")
    kept: dict[str, Any] = {
        name: value for name, value in state.items() if name not in dropped and name.split(".")[0] not in _CLASSIFIERS
    }
    expanded = torch.cat([rows[:, :stored].repeat(1, copies, 1), rows[:, stored + others :]], 1)
    return {**kept, "cls_token": token.repeat(1, copies, 1), "pos_embed": expanded}


_CLASSIFIERS = ("head", "head_dist", "fc_norm", "pre_logits")
