"""The objective of AdvCAM; what holds for every loss stands in test_common.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wsss_losses import AntiAdversarialClimbLoss, anti_adversarial_climb_loss


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 2, 5, 4, 6, generator=generator, dtype=torch.float64)
    cam, initial = (torch.rand(3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, cam, initial, torch.tensor([4, 0, 1])


def test_total_is_the_negated_objective_of_each_climber() -> None:
    logits, cam, initial, index = inputs()
    out = anti_adversarial_climb_loss(logits, cam, initial, index, ad_coeff=3.0, threshold=0.6, reduction="none")
    for m, c in enumerate(index):
        score = logits[m].relu().mean((2, 3)).sum(0)
        high = cam[m] / cam[m].max() > 0.6
        moved = (cam[m] - initial[m]).abs()[high].sum()
        torch.testing.assert_close(out.total[m], -(2 * score[c] - score.sum() - 3.0 * moved))
        torch.testing.assert_close(out.own[m], score[c])
        torch.testing.assert_close(out.moved[m], moved)
    torch.testing.assert_close(out.total, out.others - out.own + 3.0 * out.moved)


def test_where_nothing_has_moved_the_map_has_no_gradient() -> None:
    logits, cam, _, index = inputs()
    cam.requires_grad_()
    anti_adversarial_climb_loss(logits, cam, cam, index).total.backward()
    assert not cam.grad.any()


def test_only_high_entries_are_held_and_the_start_is_a_constant() -> None:
    logits, cam, initial, index = inputs()
    cam.requires_grad_()
    initial.requires_grad_()
    AntiAdversarialClimbLoss()(logits, cam, initial, index).total.backward()
    assert torch.equal(cam.grad != 0, cam > 0.5 * cam.amax((1, 2), keepdim=True))
    assert initial.grad is None


def test_a_map_of_zeros_holds_nothing() -> None:
    logits, cam, initial, index = inputs()
    assert anti_adversarial_climb_loss(logits, cam * 0, initial, index).moved == 0


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"logits: expected shape \(M, V, K, h, w\)", {"logits": torch.ones(3, 5, 4, 6)}),
        (TypeError, "logits: expected a floating-point", {"logits": torch.ones(3, 2, 5, 4, 6).long()}),
        (ValueError, "cam: expected shape .* to match logits", {"cam": torch.ones(2, 4, 6)}),
        (ValueError, "initial_cam: expected shape .* to match cam", {"initial_cam": torch.ones(3, 4, 5)}),
        (ValueError, "index: expected shape .* to match logits", {"index": torch.tensor([1])}),
        (TypeError, "index: expected an integer tensor", {"index": torch.ones(3)}),
        (ValueError, "ad_coeff: expected at least 0", {"ad_coeff": -1.0}),
        (ValueError, "threshold: expected a number in", {"threshold": -0.1}),
        (ValueError, "reduction: expected", {"reduction": "max"}),
    ],
)
def test_the_wrong_argument_is_named(error: type[Exception], message: str, change: dict[str, object]) -> None:
    names = ("logits", "cam", "initial_cam", "index")
    with pytest.raises(error, match=message):
        anti_adversarial_climb_loss(**{**dict(zip(names, inputs(), strict=True)), **change})
