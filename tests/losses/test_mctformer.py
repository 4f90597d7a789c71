from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from wsss_losses import ClassTokenContrastiveLoss, MCTformerLoss, class_token_contrastive_loss, mctformer_loss

LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


def tokens(seed: int = 0, layers: int = 3) -> Tensor:
    return torch.randn(layers, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(class_tokens: Tensor, labels: Tensor, num_layers: int) -> Tensor:
    """Block by block, image by image, class by class."""
    last = class_tokens[-num_layers:]
    costs = []
    for b, label in enumerate(labels):
        total = class_tokens.new_zeros(())
        for layer in last:
            z = F.normalize(layer[b], dim=1)
            for k in label.nonzero()[:, 0].tolist():
                total = total + F.cross_entropy((z @ z[k])[None], torch.tensor([k]))
        costs.append(total / len(last) / (label.sum() + 1e-8))
    return torch.stack(costs)


@given(st.integers(0, 99), st.integers(1, 5))
def test_contrast_equals_the_loop(seed: int, num_layers: int) -> None:
    x = tokens(seed)
    expected = reference(x, LABELS, num_layers)
    for reduction, value in {"none": expected, "sum": expected.sum(), "mean": expected.mean()}.items():
        ours = class_token_contrastive_loss(x, LABELS, num_layers=num_layers, reduction=reduction)
        torch.testing.assert_close(ours, value)


@given(st.floats(1e-3, 1e3))
def test_contrast_sees_directions_only(factor: float) -> None:
    x = tokens()
    torch.testing.assert_close(
        class_token_contrastive_loss(factor * x, LABELS), class_token_contrastive_loss(x, LABELS)
    )


@given(st.permutations(range(4)))
def test_contrast_does_not_depend_on_the_order_of_classes(order: list[int]) -> None:
    torch.testing.assert_close(
        class_token_contrastive_loss(tokens()[:, :, order], LABELS[:, order]),
        class_token_contrastive_loss(tokens(), LABELS),
    )


def test_tokens_that_are_alike_cost_log_k_and_tokens_of_length_0_have_a_finite_gradient() -> None:
    alike = torch.ones(2, 1, 4, 5, dtype=torch.float64)
    loss = class_token_contrastive_loss(alike, torch.ones(1, 4))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-7)
    for dtype in (torch.float32, torch.float16):
        x = tokens().to(dtype)
        x[:, :, 1] = 0
        x.requires_grad_()
        loss = class_token_contrastive_loss(x, LABELS)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        assert not x.grad[:, :, 1].any()


def test_image_without_a_class_costs_nothing() -> None:
    x = tokens().requires_grad_()
    each = class_token_contrastive_loss(x, LABELS, reduction="none")
    assert each[1] == 0
    (grad,) = torch.autograd.grad(each.sum(), x)
    assert grad.isfinite().all()
    assert not grad[:, 1].any()


def test_terms_are_soft_margins_and_the_weighted_contrast() -> None:
    torch.manual_seed(0)
    of_class, of_patch = torch.randn(2, 3, 4, dtype=torch.float64)
    x = tokens()
    terms = mctformer_loss(of_class, of_patch, x, LABELS, contrast_weight=0.3, num_layers=2)
    torch.testing.assert_close(terms.class_tags, F.multilabel_soft_margin_loss(of_class, LABELS))
    torch.testing.assert_close(terms.patch_tags, F.multilabel_soft_margin_loss(of_patch, LABELS))
    torch.testing.assert_close(terms.contrast, class_token_contrastive_loss(x, LABELS, num_layers=2))
    torch.testing.assert_close(terms.total, terms.class_tags + terms.patch_tags + 0.3 * terms.contrast)
    first = mctformer_loss(of_class, None, None, LABELS)
    assert (first.total, first.patch_tags, first.contrast) == (terms.class_tags, 0, 0)


def test_reductions_are_over_the_images() -> None:
    torch.manual_seed(0)
    of_class, of_patch = torch.randn(2, 3, 4, dtype=torch.float64)
    inputs = (of_class, of_patch, tokens(), LABELS)
    each = mctformer_loss(*inputs, reduction="none").total
    assert each.shape == (3,)
    torch.testing.assert_close(mctformer_loss(*inputs, reduction="sum").total, each.sum())
    torch.testing.assert_close(mctformer_loss(*inputs).total, each.mean())
    for i in range(3):
        one = mctformer_loss(of_class[i : i + 1], of_patch[i : i + 1], tokens()[:, i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(one.total, each[i])


def test_messages() -> None:
    z, x = torch.zeros(3, 4), tokens()
    with pytest.raises(ValueError, match=r"labels: expected shape \(3, 4\) to match class_logits, got \(2, 4\)"):
        mctformer_loss(z, None, None, LABELS[:2])
    with pytest.raises(ValueError, match="patch_logits: expected shape"):
        mctformer_loss(z, z[:2], None, LABELS)
    with pytest.raises(ValueError, match=r"class_tokens: expected shape \(\*, 3, 4, \*\) to match class_logits"):
        mctformer_loss(z, None, x[:, :2], LABELS)
    for make in (ClassTokenContrastiveLoss, MCTformerLoss):
        with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
            make(num_layers=0)
    with pytest.raises(ValueError, match="class_tokens: expected at least one block, got none"):
        class_token_contrastive_loss(x[:0], LABELS)
    with pytest.raises(TypeError, match="class_logits: expected a floating-point tensor"):
        mctformer_loss(z.long(), None, None, LABELS)
    with pytest.raises(ValueError, match='reduction: expected "mean", "sum" or "none"'):
        mctformer_loss(z, None, None, LABELS, reduction="max")
    with pytest.raises(ValueError, match=r"class_tokens: expected shape \(L, B, K, D\)"):
        class_token_contrastive_loss(x[0], LABELS)
    with pytest.raises(ValueError, match="labels: expected shape"):
        class_token_contrastive_loss(x, LABELS[:, :3])
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        class_token_contrastive_loss(x, LABELS, num_layers=0)
    with pytest.raises(TypeError, match="class_tokens: expected a floating-point tensor"):
        class_token_contrastive_loss(x.long(), LABELS)
