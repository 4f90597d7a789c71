import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from wsss_losses import NoiseAwareLoss, noise_aware_loss
from wsss_modules import CosineClassifier, cosine_logits, fuse_labels, label_confidence


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines at the size of the labels, the fused label and the one to fall back on, float64."""
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(2, 4, 5, 6, generator=generator, dtype=torch.float64) * 2 - 1
    y_crf, y_ret = torch.randint(0, 4, (2, 2, 5, 6), generator=generator)
    y_crf[:, 0], y_ret[:, 0] = 255, 255
    return cosine, fuse_labels(y_crf, y_ret), y_crf


def reference(cosine: Tensor, fused: Tensor, y_crf: Tensor, gamma: float = 7.0, lam: float = 0.1) -> Tensor:
    """Pixel by pixel, as the formula says."""
    trusted, noisy, mass = [], [], []
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in fused.shape)).tolist():
        scores, label, crf = cosine[b, :, y, x], int(fused[b, y, x]), int(y_crf[b, y, x])
        cost = -(20 * scores).log_softmax(0)
        if label != 255:
            trusted.append(cost[label])
        elif crf != 255:
            sigma = ((1 + scores[crf]) / (1 + scores).max()) ** gamma
            noisy.append(sigma * cost[crf])
            mass.append(sigma)
    return torch.stack(trusted).mean() + lam * torch.stack(noisy).sum() / torch.stack(mass).sum()


@given(st.integers(0, 99), st.sampled_from([0.0, 1.0, 7.0]), st.sampled_from([0.0, 0.1, 2.0]))
def test_loss_and_gradient_equal_the_loop_over_pixels(seed: int, gamma: float, lam: float) -> None:
    cosine, fused, y_crf = case(seed)
    leaf = cosine.requires_grad_()
    total = noise_aware_loss(leaf, fused, y_crf, gamma=gamma, lam=lam).total
    expected = reference(leaf, fused, y_crf, gamma, lam)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, leaf), torch.autograd.grad(expected, leaf))


def test_nothing_unreliable_leaves_the_cross_entropy() -> None:
    cosine, _, y_crf = case()
    leaf = cosine.requires_grad_()
    terms = noise_aware_loss(leaf, y_crf, y_crf)
    plain = F.cross_entropy(20 * leaf, y_crf, ignore_index=255)
    torch.testing.assert_close(terms.total, plain)
    assert terms.noisy == 0
    torch.testing.assert_close(torch.autograd.grad(terms.total, leaf), torch.autograd.grad(plain, leaf))


def test_nothing_trusted_leaves_the_weighted_term() -> None:
    cosine, fused, y_crf = case()
    terms = noise_aware_loss(cosine, torch.full_like(fused, 255), y_crf)
    assert terms.trusted == 0
    torch.testing.assert_close(terms.total, 0.1 * terms.noisy)
    assert terms.noisy > 0


def test_no_label_at_all_costs_0_with_a_gradient_of_0() -> None:
    cosine, fused, _ = case()
    leaf, void = cosine.requires_grad_(), torch.full_like(fused, 255)
    terms = noise_aware_loss(leaf, void, void)
    assert terms.total == 0
    assert not torch.autograd.grad(terms.total, leaf)[0].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 7.0])
def test_features_opposite_to_every_class_have_no_confidence_and_stay_finite(gamma: float) -> None:
    leaf = torch.full((1, 3, 2, 2), -1.0, requires_grad=True)
    fused, y_crf = torch.full((1, 2, 2), 255), torch.ones(1, 2, 2, dtype=torch.int64)
    terms = noise_aware_loss(leaf, fused, y_crf, gamma=gamma)
    assert terms.total.isfinite()
    assert torch.autograd.grad(terms.total, leaf)[0].isfinite().all()
    assert (terms.noisy == 0) == (gamma > 0)


@pytest.mark.parametrize("above", [1e-7, 1e-6, 3e-6, 1e-5, 1e-4])
def test_a_confidence_that_almost_vanishes_keeps_a_finite_gradient(above: float) -> None:
    leaf = torch.tensor([0.5, -1 + above]).view(1, 2, 1, 1).requires_grad_()
    fused, y_crf = torch.full((1, 1, 1), 255), torch.ones(1, 1, 1, dtype=torch.int64)
    terms = noise_aware_loss(leaf, fused, y_crf)
    (grad,) = torch.autograd.grad(terms.total, leaf)
    assert grad.isfinite().all()
    noisy = float(terms.noisy.detach())
    assert noisy == 0 or noisy == pytest.approx(20 * (1.5 - above), rel=1e-6)  # 4e-8 measured


@given(st.integers(0, 99), st.sampled_from([0.0, 0.5, 7.0]))
def test_confidence_is_a_share_and_whole_where_the_prediction_agrees(seed: int, gamma: float) -> None:
    cosine, _, y_crf = case(seed)
    confidence, known = label_confidence(cosine, y_crf, gamma=gamma), y_crf != 255
    assert not confidence[~known].any()
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert (confidence[known & (cosine.argmax(1) == y_crf)] == 1).all()
    assert ((confidence[known & (cosine.argmax(1) != y_crf)] < 1) == (gamma > 0)).all()


def test_gamma_0_is_a_plain_mean() -> None:
    cosine, fused, y_crf = case()
    unsure = torch.where(fused == 255, y_crf, 255)
    noisy = noise_aware_loss(cosine, fused, y_crf, gamma=0.0).noisy
    torch.testing.assert_close(noisy, F.cross_entropy(20 * cosine, unsure, ignore_index=255))


def test_detached_confidence_changes_the_gradient_and_not_the_value() -> None:
    cosine, fused, y_crf = case()
    leaf = cosine.requires_grad_()
    results = [noise_aware_loss(leaf, fused, y_crf, detach_confidence=detach).total for detach in (False, True)]
    torch.testing.assert_close(*results)
    first, second = (torch.autograd.grad(total, leaf)[0] for total in results)
    assert not torch.allclose(first, second)


@given(st.floats(0.01, 100), st.integers(0, 99))
def test_lengths_of_features_and_weights_change_nothing(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    _, fused, y_crf = case(seed)
    plain = noise_aware_loss(cosine_logits(features, weight), fused, y_crf)
    scale = torch.rand(2, 1, 4, 5, generator=generator, dtype=torch.float64) + 0.1
    moved = noise_aware_loss(cosine_logits(features * scale, weight * factor), fused, y_crf)
    torch.testing.assert_close(moved, plain)


def test_coarse_cosines_are_resized_with_aligned_corners() -> None:
    cosine, fused, y_crf = case()
    coarse = cosine[:, :, ::2, ::2]
    up = F.interpolate(coarse, (5, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(noise_aware_loss(coarse, fused, y_crf), noise_aware_loss(up, fused, y_crf))


def test_cosines_are_those_of_the_vectors() -> None:
    classifier = CosineClassifier(3, 4).double()
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = F.cosine_similarity(features[:, None], classifier.weight[None, :, :, None, None], dim=2)
    torch.testing.assert_close(classifier(features), expected)
    assert torch.equal(classifier(features), cosine_logits(features, classifier.weight[:, :, None, None]))
    assert gradcheck(cosine_logits, (features.requires_grad_(), classifier.weight))
    half = cosine_logits(features.detach().half(), classifier.weight.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), expected.detach(), rtol=0, atol=2e-3)


def test_training_under_noise_prefers_the_consistent_label() -> None:
    """Unreliable pixels whose label contradicts what the trusted ones teach lose their say."""
    torch.manual_seed(0)
    kind = torch.randint(0, 2, (1, 12, 12))
    features = F.one_hot(kind, 2).permute(0, 3, 1, 2).float() + 0.1 * torch.randn(1, 2, 12, 12)
    y_crf, fused = kind.clone(), kind.clone()
    y_crf[:, :6], fused[:, :6] = 1 - kind[:, :6], 255
    classifier, criterion = CosineClassifier(2, 2), NoiseAwareLoss()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01)
    for _ in range(60):
        terms = criterion(classifier(features), fused, y_crf)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    assert (classifier(features).argmax(1) == kind).float().mean() > 0.95
    assert label_confidence(classifier(features), y_crf)[:, :6].mean() < 0.1


COSINE, FUSED, Y_CRF = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: noise_aware_loss(COSINE[0], FUSED, Y_CRF), ValueError, r"cosine: expected shape \(B, C, h, w\)"),
        (lambda: noise_aware_loss(COSINE.long(), FUSED, Y_CRF), TypeError, r"cosine: expected a floating"),
        (lambda: noise_aware_loss(COSINE, FUSED.float(), Y_CRF), TypeError, r"y_fused: expected an integer"),
        (lambda: noise_aware_loss(COSINE, FUSED[:1], Y_CRF), ValueError, r"y_fused: expected shape \(2, \*, \*\)"),
        (lambda: noise_aware_loss(COSINE, FUSED, Y_CRF[:, 1:]), ValueError, r"y_crf: expected shape \(2, 5, 6\)"),
        (
            lambda: label_confidence(COSINE, Y_CRF[:, 1:]),
            ValueError,
            r"label: expected shape \(2, 5, 6\) to match cosine",
        ),
        (lambda: label_confidence(COSINE, Y_CRF, gamma=-1), ValueError, r"gamma: expected at least 0, got -1"),
        (lambda: NoiseAwareLoss(gamma=-1), ValueError, r"gamma: expected at least 0, got -1"),
        (lambda: NoiseAwareLoss(lam=-0.1), ValueError, r"lam: expected at least 0, got -0.1"),
        (lambda: NoiseAwareLoss(temperature=0), ValueError, r"temperature: expected above 0, got 0"),
        (
            lambda: cosine_logits(COSINE, COSINE[0, :, 0]),
            ValueError,
            r"weight: expected shape \(\*, 4\) or \(\*, 4, 1, 1\) to match features",
        ),
        (lambda: cosine_logits(COSINE[0], COSINE[0, :, 0]), ValueError, r"features: expected shape \(B, D, h, w\)"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
