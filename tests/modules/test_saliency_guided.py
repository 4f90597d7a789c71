import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsss_modules import cam_to_mask, edam_pseudo_label, saliency_guided_scores


def guided_pixel(classes: list[float], salient: bool) -> int:
    """The rule in words, for one pixel."""
    certain = [k for k, score in enumerate(classes) if score > 0.99999]
    if certain:
        return certain[0] + 1
    if not salient:
        return 0
    best = max(range(len(classes)), key=lambda k: classes[k])
    return best + 1 if classes[best] >= 1e-6 else 0


@given(st.integers(0, 99))
def test_label_follows_the_rule_pixel_by_pixel(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(2, 3, 4, 5, generator=generator)
    kind = torch.rand(2, 3, 4, 5, generator=generator)
    cam = torch.where(kind < 0.3, 0.0, torch.where(kind > 0.9, 1.0, cam))
    saliency = torch.rand(2, 1, 4, 5, generator=generator) * 0.16
    mask = edam_pseudo_label(cam, saliency)
    assert mask.dtype == torch.int64
    for b in range(2):
        for row in range(4):
            for column in range(5):
                salient = bool(saliency[b, 0, row, column] > 20 / 255)
                assert mask[b, row, column] == guided_pixel(cam[b, :, row, column].tolist(), salient)


def test_grey_level_20_is_not_salient_and_21_is() -> None:
    cam = torch.full((1, 1, 1, 2), 0.5)
    for dtype in (torch.float32, torch.float64):  # read off a file in float32, as a rule
        saliency = (torch.tensor([20, 21]).to(dtype) / 255).view(1, 1, 1, 2)
        assert edam_pseudo_label(cam, saliency).tolist() == [[[0, 1]]]
        assert edam_pseudo_label(cam, saliency, salient=21 / 255).tolist() == [[[0, 0]]]


def test_without_saliency_the_threshold_is_the_background() -> None:
    cam, keys = torch.rand(2, 3, 4, 5), torch.tensor([2, 5, 9])
    assert torch.equal(edam_pseudo_label(cam, threshold=0.6, keys=keys), cam_to_mask(cam, 0.6, keys=keys))
    assert torch.equal(edam_pseudo_label(cam), cam_to_mask(cam, 0.5))


def test_keys_name_the_classes_and_no_class_is_background() -> None:
    cam, saliency = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    label, named = edam_pseudo_label(cam, saliency), edam_pseudo_label(cam, saliency, keys=torch.tensor([2, 5, 9]))
    assert torch.equal(torch.tensor([0, 2, 5, 9])[label], named)
    assert not edam_pseudo_label(cam[:, :0], saliency, keys=torch.zeros(0, dtype=torch.int64)).any()
    assert not edam_pseudo_label(cam * 0, torch.ones_like(saliency)).any(), "salient, but no class reaches alpha"


def test_scores_keep_their_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cam = torch.rand(1, 2, 3, 4).to(dtype)
        scores = saliency_guided_scores(cam, torch.rand(1, 1, 3, 4))
        assert scores.dtype == dtype
        assert scores.shape == (1, 3, 3, 4)
    compiled = torch.compile(saliency_guided_scores, fullgraph=True, backend="aot_eager")
    saliency = torch.rand(1, 1, 3, 4)
    assert torch.equal(compiled(cam, saliency), saliency_guided_scores(cam, saliency))


CAM, SALIENCY = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: saliency_guided_scores(CAM[0], SALIENCY), ValueError, r"cam: expected shape \(B, K, H, W\), got"),
        (lambda: saliency_guided_scores(CAM.long(), SALIENCY), TypeError, r"cam: expected a floating-point tensor"),
        (lambda: saliency_guided_scores(CAM, SALIENCY.byte()), TypeError, r"saliency: expected a floating-point ten"),
        (
            lambda: saliency_guided_scores(CAM, CAM),
            ValueError,
            r"saliency: expected shape \(2, 1, 4, 5\) to match cam, got \(2, 3, 4, 5\)",
        ),
        (lambda: saliency_guided_scores(CAM, SALIENCY, alpha=1, beta=0.5), ValueError, r"alpha: expected at most beta"),
        (
            lambda: edam_pseudo_label(CAM, SALIENCY, keys=torch.tensor([1, 2])),
            ValueError,
            r"keys: expected shape \(3,\) to match cam, got \(2,\)",
        ),
        (lambda: edam_pseudo_label(CAM, SALIENCY, keys=torch.rand(3)), TypeError, r"keys: expected an integer tensor"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
