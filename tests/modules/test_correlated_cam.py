"""L2G's head: classify, then propagate."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from tests.modules import reference_l2g
from wsss_modules import PixelCorrelationCAMHead, PixelCorrelationCAMOutput


def head_and_inputs() -> tuple[PixelCorrelationCAMHead, list[Tensor]]:
    torch.manual_seed(0)
    head = PixelCorrelationCAMHead(8, 3, side_channels=(4, 6), side_widths=(5, 7), embed=9, chunk=7).double()
    shapes = (2, 8, 4, 5), (2, 4, 8, 10), (2, 6, 4, 5), (2, 3, 33, 41)
    return head, [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def keys_of(head: PixelCorrelationCAMHead, low: Tensor, high: Tensor, images: Tensor) -> Tensor:
    def on_grid(x: Tensor) -> Tensor:
        return F.interpolate(x, (4, 5), mode="bilinear", align_corners=True)

    sides = [on_grid(images), on_grid(head.low(low.detach())), on_grid(head.high(high.detach()))]
    return head.correlation.embed(torch.cat(sides, 1))


def test_classifying_first_gives_the_values_and_gradients_of_propagating_first() -> None:
    head, inputs = head_and_inputs()
    scores = head(*inputs).scores
    expected = reference_l2g.propagate_then_classify(inputs[0], head.classifier.weight, keys_of(head, *inputs[1:]))
    torch.testing.assert_close(scores, expected)
    direction = torch.randn_like(scores)
    leaves = [inputs[0], *head.parameters()]
    pairs = (torch.autograd.grad((x * direction).sum(), leaves) for x in (scores, expected))
    torch.testing.assert_close(*pairs)


def test_image_scores_are_the_mean_of_the_class_maps() -> None:
    head, inputs = head_and_inputs()
    out = head(*inputs)
    assert isinstance(out, PixelCorrelationCAMOutput)
    assert out.scores.shape == (2, 4, 4, 5)
    torch.testing.assert_close(out.logits, out.scores[:, 1:].mean((2, 3)))


def test_every_layer_learns_and_the_earlier_maps_do_not() -> None:
    head, inputs = head_and_inputs()
    head(*inputs).scores.square().sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in head.parameters())
    assert inputs[0].grad.any()
    assert inputs[1].grad is None
    assert inputs[2].grad is None


def test_a_constant_map_is_doubled() -> None:
    head, (features, *sides) = head_and_inputs()
    constant = features.detach()[:1, :, :1, :1].expand_as(features)
    own = head.classifier(constant)
    torch.testing.assert_close(head(constant, *sides).scores, 2 * own, rtol=2e-5, atol=1e-5)  # eps beside the sums


def test_keys_of_zeros_leave_each_pixel_its_own_score() -> None:
    head, (features, low, high, images) = head_and_inputs()
    out = head(features, low * 0, high * 0, images * 0)
    torch.testing.assert_close(out.scores, head.classifier(features))
    grads = torch.autograd.grad(out.scores.sum(), [features, *head.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


def test_gradcheck_and_one_graph() -> None:
    head, inputs = head_and_inputs()
    rest = [x.detach() for x in inputs[1:]]
    assert gradcheck(lambda x: tuple(head(x[:1], *(r[:1] for r in rest))), inputs[0].detach()[:1].requires_grad_())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), head(*inputs))


def test_state_dict_has_the_released_layers() -> None:
    head, inputs = head_and_inputs()
    names = {head.released_key(f"{name}.weight") for name in ("fc8", "f8_3", "f8_4", "f9")}
    assert names == set(head.state_dict())
    other = PixelCorrelationCAMHead(8, 3, side_channels=(4, 6), side_widths=(5, 7), embed=9).double()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(*inputs), head(*inputs))


def test_one_class_one_cell_and_no_image_are_mapped() -> None:
    head = PixelCorrelationCAMHead(8, 1, side_channels=(4, 6))
    out = head(torch.rand(1, 8, 1, 1), torch.rand(1, 4, 2, 2), torch.rand(1, 6, 1, 1), torch.rand(1, 3, 8, 8))
    assert out.logits.shape == (1, 1)
    assert out.scores.isfinite().all()


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 7, 4, 5), r"features: expected shape \(\*, 8, \*, \*\) for this head, got \(2, 7, 4, 5\)"),
        (1, (2, 3, 8, 10), r"low: expected shape \(2, 4, \*, \*\) for this head and features, got \(2, 3, 8, 10\)"),
        (2, (1, 6, 4, 5), r"high: expected shape \(2, 6, \*, \*\) for this head and features, got \(1, 6, 4, 5\)"),
        (3, (2, 1, 33, 41), r"images: expected shape \(2, 3, \*, \*\) to match features, got \(2, 1, 33, 41\)"),
    ],
    ids=["features", "low", "high", "images"],
)
def test_messages(place: int, shape: tuple[int, ...], message: str) -> None:
    head, inputs = head_and_inputs()
    inputs[place] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        head(*inputs)
