"""L2G's transfer and its whole objective."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.modules import reference_l2g
from wsss_losses import L2GLoss, LocalToGlobalTransferLoss, l2g_loss, local_to_global_transfer_loss
from wsss_modules import corner_and_random_boxes, local_attention_target, random_boxes

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])


def case(seed: int = 0) -> list[Tensor]:
    """Maps of two images of 64 pixels, logits, maps and boxes of five crops each, and their saliency."""
    generator = torch.Generator().manual_seed(seed)
    boxes = corner_and_random_boxes((64, 64), 40, 5, images=2, generator=generator)
    shapes = (2, 4, 8, 8), (10, 3), (10, 4, 5, 5), (10, 1, 40, 40)
    whole, logits, local, saliency = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [whole.requires_grad_(), logits.requires_grad_(), local.requires_grad_(), LABELS, boxes, saliency.sigmoid()]


@given(st.integers(0, 99), st.sampled_from([("binary", 1e-3, 10.0), ("value", 0.1, 30.0)]))
def test_objective_is_put_together_from_its_parts(seed: int, options: tuple[str, float, float]) -> None:
    background, threshold, weight = options
    whole, logits, local, labels, boxes, saliency = inputs = case(seed)
    terms = l2g_loss(*inputs, weight=weight, threshold=threshold, background=background)
    of_crops = labels.repeat_interleave(5, 0)
    read = reference_l2g.roi_align(whole, boxes, (5, 5), 8, aligned=False).softmax(1)
    target = reference_l2g.target_by_loops(local, of_crops, saliency, threshold, background, "zero")
    torch.testing.assert_close(terms.transfer, weight * F.mse_loss(read, target.detach()))
    torch.testing.assert_close(terms.classification, F.multilabel_soft_margin_loss(logits, of_crops.double()))
    of_whole = F.multilabel_soft_margin_loss(whole[:, 1:].mean((2, 3)), labels.double())
    torch.testing.assert_close(terms.global_classification, of_whole)
    torch.testing.assert_close(terms.total, terms.transfer + terms.classification)
    both = l2g_loss(*inputs, weight=weight, threshold=threshold, background=background, global_weight=0.5)
    torch.testing.assert_close(both.total, terms.total + 0.5 * of_whole)


def test_transfer_never_reaches_the_network_of_the_crops_nor_tags_that_of_the_images() -> None:
    whole, logits, local, *rest = case()
    terms = l2g_loss(whole, logits, local, *rest)
    leaves = [whole, logits, local]
    of_transfer = torch.autograd.grad(terms.transfer, leaves, allow_unused=True, retain_graph=True)
    of_tags = torch.autograd.grad(terms.classification, leaves, allow_unused=True, retain_graph=True)
    of_total = torch.autograd.grad(terms.total, leaves, allow_unused=True)
    assert of_transfer[0].any()
    assert of_transfer[1:] == (None, None)
    assert of_tags[1].any()
    assert (of_tags[0], of_tags[2]) == (None, None)
    torch.testing.assert_close(of_total[0], of_transfer[0])
    torch.testing.assert_close(of_total[1], of_tags[1])


def test_crops_read_the_image_that_their_box_names() -> None:
    whole, logits, local, labels, boxes, saliency = case()
    order = torch.randperm(10)
    shuffled = l2g_loss(whole, logits[order], local[order], labels, boxes[order], saliency[order])
    torch.testing.assert_close(shuffled, l2g_loss(*case()))
    swapped = boxes.clone()
    swapped[:, 0] = 1 - boxes[:, 0]
    torch.testing.assert_close(
        l2g_loss(whole.flip(0), logits, local, labels.flip(0), swapped, saliency), l2g_loss(*case())
    )


def test_maps_that_equal_the_target_cost_nothing_but_released_reading_costs_the_shift() -> None:
    scores = torch.full((1, 3, 8, 8), -30.0)
    scores[:, 1, :, :4], scores[:, 0, :, 4:] = 30, 30
    boxes = random_boxes((64, 64), 48, 3, offsets=torch.tensor([[[0, 0], [16, 8], [8, 16]]]))
    target = torch.stack([scores[0, :, y // 8 : y // 8 + 6, x // 8 : x // 8 + 6] for x, y in boxes[:, 1:3].tolist()])
    target = (target > 0).float()
    assert local_to_global_transfer_loss(scores, target, boxes, aligned=True) < 1e-10
    assert local_to_global_transfer_loss(scores, target, boxes) > 0.1


def test_reductions_are_over_the_crops() -> None:
    whole, _, local, _, boxes, _ = case()
    target = local_attention_target(local, LABELS.repeat_interleave(5, 0))
    each = local_to_global_transfer_loss(whole, target, boxes, reduction="none")
    assert each.shape == (10,)
    torch.testing.assert_close(local_to_global_transfer_loss(whole, target, boxes), each.mean())
    torch.testing.assert_close(local_to_global_transfer_loss(whole, target, boxes, reduction="sum"), each.sum())
    alone = local_to_global_transfer_loss(whole, target[3:4], boxes[3:4])
    torch.testing.assert_close(alone, each[3])


def test_no_crop_at_all_costs_0_and_stays_attached() -> None:
    whole, logits, local, labels, boxes, saliency = case()
    terms = l2g_loss(whole, logits[:0], local[:0], labels, boxes[:0], saliency[:0])
    assert terms.total == 0
    assert not torch.autograd.grad(terms.total, whole)[0].any()


def test_float_boxes_are_those_of_integers() -> None:
    whole, logits, local, labels, boxes, saliency = case()
    torch.testing.assert_close(l2g_loss(whole, logits, local, labels, boxes.float(), saliency), l2g_loss(*case()))


def test_training_moves_the_map_of_an_image_to_what_its_crops_show() -> None:
    torch.manual_seed(0)
    boxes = corner_and_random_boxes((64, 64), 40, 6)
    truth = torch.full((1, 3, 8, 8), -1.0)
    truth[:, 0], truth[:, 1, 2:6, 2:6], truth[:, 0, 2:6, 2:6] = 1, 1, -1
    local = torch.stack([truth[0, :, y // 8 : y // 8 + 5, x // 8 : x // 8 + 5] for x, y in boxes[:, 1:3].tolist()])
    whole = torch.zeros(1, 3, 8, 8, requires_grad=True)
    labels, logits = torch.tensor([[1, 0]]), torch.zeros(6, 2)
    optimizer, criterion = torch.optim.Adam([whole], lr=0.1), L2GLoss(aligned=True)
    boxes[:, 1:] = boxes[:, 1:] // 8 * 8
    for _ in range(100):
        optimizer.zero_grad()
        criterion(whole, logits, local, labels, boxes).total.backward()
        optimizer.step()
    assert torch.equal(whole.argmax(1), truth.argmax(1))


WHOLE, LOGITS, LOCAL, _, BOXES, SALIENCY = (x.detach() for x in case())
TARGET = LOCAL.softmax(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: local_to_global_transfer_loss(WHOLE[0], TARGET, BOXES),
            ValueError,
            r"scores: expected shape \(B, 1\+K, H, W\), got \(4, 8, 8\)",
        ),
        (
            lambda: local_to_global_transfer_loss(WHOLE.long(), TARGET, BOXES),
            TypeError,
            "scores: expected a floating-point tensor",
        ),
        (
            lambda: local_to_global_transfer_loss(WHOLE, TARGET.long(), BOXES),
            TypeError,
            "target: expected a floating-point tensor",
        ),
        (
            lambda: local_to_global_transfer_loss(WHOLE, TARGET[:4], BOXES),
            ValueError,
            r"target: expected shape \(10, 4, \*, \*\) to match boxes, scores, got \(4, 4, 5, 5\)",
        ),
        (
            lambda: local_to_global_transfer_loss(WHOLE, TARGET, BOXES[:, 1:]),
            ValueError,
            r"boxes: expected shape \(\*, 5\) of image, x1, y1, x2, y2, got \(10, 4\)",
        ),
        (lambda: LocalToGlobalTransferLoss(weight=-1), ValueError, "weight: expected at least 0, got -1"),
        (lambda: LocalToGlobalTransferLoss(reduction="max"), ValueError, 'reduction: expected "mean", "sum" or "none"'),
        (lambda: L2GLoss(global_weight=-1), ValueError, "global_weight: expected at least 0, got -1"),
        (lambda: L2GLoss(threshold=-1), ValueError, "threshold: expected at least 0, got -1"),
        (lambda: L2GLoss(background="soft"), ValueError, 'background: expected "binary" or "value", got \'soft\''),
        (
            lambda: l2g_loss(WHOLE, LOGITS, LOCAL, LABELS[:, :2], BOXES),
            ValueError,
            r"labels: expected shape \(2, 3\) to match global_scores, got \(2, 2\)",
        ),
        (
            lambda: l2g_loss(WHOLE, LOGITS[:4], LOCAL, LABELS, BOXES),
            ValueError,
            r"local_logits: expected shape \(10, 3\) to match boxes, labels, got \(4, 3\)",
        ),
        (
            lambda: l2g_loss(WHOLE, LOGITS, LOCAL[:, 1:], LABELS, BOXES),
            ValueError,
            r"local_scores: expected shape \(10, 4, \*, \*\) to match boxes, labels, got \(10, 3, 5, 5\)",
        ),
        (
            lambda: l2g_loss(WHOLE, LOGITS, LOCAL.long(), LABELS, BOXES),
            TypeError,
            "local_scores: expected a floating-point tensor",
        ),
        (
            lambda: l2g_loss(WHOLE, LOGITS, LOCAL, LABELS, BOXES, SALIENCY[:4]),
            ValueError,
            r"saliency: expected shape \(10, 1, \*, \*\) to match the class maps, got \(4, 1, 40, 40\)",
        ),
    ],
    ids=[
        *("scores", "integer", "integer-target", "target", "boxes", "weight", "reduction", "global_weight"),
        *("threshold", "background", "labels", "logits", "local", "integer-local", "saliency"),
    ],
)
def test_messages_name_argument_expected_and_given(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
