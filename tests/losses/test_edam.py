import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from wsss_losses import EDAMLoss, edam_loss
from wsss_modules import EDAMHead, sample_class_keys

LABELS = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 1]])


@given(st.integers(0, 99))
def test_loss_is_the_cross_entropy_of_logits_and_labels_image_by_image(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = sample_class_keys(LABELS.view(2, 2, 4), 3, generator=generator)
    logits = torch.randn(4, 3, generator=generator)
    targets = [[LABELS[b, k - 1] for k in keys[b // 2].tolist()] for b in range(4)]
    flat = torch.tensor(targets).flatten()
    torch.testing.assert_close(
        edam_loss(logits, LABELS, keys), F.binary_cross_entropy_with_logits(logits.flatten(), flat)
    )
    each = edam_loss(logits, LABELS, keys, reduction="none")
    torch.testing.assert_close(each[1], F.binary_cross_entropy_with_logits(logits[1], flat.view(4, 3)[1]))
    torch.testing.assert_close(edam_loss(logits, LABELS, keys, reduction="sum"), each.sum())


def test_one_row_of_classes_serves_all_images() -> None:
    logits, keys = torch.randn(4, 2), torch.tensor([4, 1])
    torch.testing.assert_close(edam_loss(logits, LABELS, keys), edam_loss(logits, LABELS, keys.expand(4, 2)))
    torch.testing.assert_close(edam_loss(logits, LABELS, keys), edam_loss(logits.flip(1), LABELS, keys.flip(0)))


def test_labels_may_be_bool_integers_or_soft() -> None:
    logits, keys = torch.randn(4, 2), torch.tensor([4, 1])
    expected = edam_loss(logits, LABELS, keys)
    for labels in (LABELS.bool(), LABELS.long(), LABELS.double()):
        torch.testing.assert_close(edam_loss(logits, labels, keys), expected, check_dtype=False)
    soft = edam_loss(logits, LABELS * 0.5, keys)
    torch.testing.assert_close(soft, F.binary_cross_entropy_with_logits(logits, 0.5 * LABELS[:, [3, 0]]))


def test_saturated_logits_keep_a_live_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = edam_loss(logits, torch.tensor([[0.0, 1.0]]), torch.tensor([1, 2]))
    assert loss == 1e4
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.tolist() == [[0.5, -0.5]]


def test_no_image_is_0_and_attached() -> None:
    logits = torch.zeros(0, 2, requires_grad=True)
    loss = edam_loss(logits, torch.zeros(0, 4), torch.tensor([1, 2]))
    assert loss == 0
    loss.backward()


def test_mask_of_an_absent_class_learns_too() -> None:
    torch.manual_seed(0)
    head, labels = EDAMHead(5, 4, 8).eval(), LABELS[:2]
    keys = torch.tensor([1, 4])  # present in both images, and in neither
    edam_loss(head(torch.randn(2, 5, 3, 3), keys).logits, labels, keys).backward()
    grads = head.attention.classifier.grad.abs().sum(1)
    assert (grads > 0).tolist() == [True, False, False, True]
    assert head.activation.conv.weight.grad[4].any()


LOGITS, KEYS = torch.zeros(4, 2), torch.tensor([4, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edam_loss(LOGITS[0], LABELS, KEYS), ValueError, r"logits: expected shape \(B, S\), got \(2,\)"),
        (lambda: edam_loss(LOGITS.long(), LABELS, KEYS), TypeError, r"logits: expected a floating-point"),
        (lambda: edam_loss(LOGITS, LABELS[:2], KEYS), ValueError, r"labels: expected shape \(4, \*\) to match logits"),
        (lambda: edam_loss(LOGITS, LABELS, KEYS.float()), TypeError, r"keys: expected an integer tensor, got torch.fl"),
        (
            lambda: edam_loss(LOGITS, LABELS, KEYS[:1]),
            ValueError,
            r"keys: expected shape \(\*, 2\) to match logits, got \(1, 1\)",
        ),
        (
            lambda: edam_loss(LOGITS, LABELS, KEYS.expand(3, 2)),
            ValueError,
            r"keys: expected a number of groups that divides the 4 images, got 3",
        ),
        (lambda: EDAMLoss(reduction="max"), ValueError, r'reduction: expected "mean", "sum" or "none", got \'max\''),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
