import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules import IRN_CRF, DenseCRF, confident_label, confident_label_from_cam


def scores(batch: int = 2, channels: int = 4, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, channels, size, size), torch.rand(batch, channels, size, size)


def test_confident_label_equals_the_rules_pixel_by_pixel() -> None:
    low, high = scores()
    low[:, :, 0], high[:, :, 0] = 0, 0  # padding
    label = confident_label(low, high)
    for b in range(2):
        for y in range(8):
            for x in range(8):
                expected = int(low[b, :, y, x].argmax()) or 255
                if int(high[b, :, y, x].argmax()) == 0:
                    expected = 0
                if max(low[b, :, y, x].max(), high[b, :, y, x].max()) < 1e-5:
                    expected = 255
                assert label[b, y, x] == expected
    assert label.dtype == torch.int64
    assert set(label.unique().tolist()) == {0, 1, 2, 3, 255}


def test_confident_label_of_a_padded_crop_is_unsure() -> None:
    assert bool((confident_label(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)) == 255).all())


def test_confident_label_where_background_wins_twice_is_background() -> None:
    background = torch.tensor([0.9, 0.1, 0.2])[None, :, None, None].expand(1, 3, 4, 4)
    assert not confident_label(background, background).any()


def test_confident_label_ties_go_to_the_first_channel() -> None:
    tie = torch.full((1, 3, 1, 1), 0.5)
    assert confident_label(tie, tie).item() == 0


def test_confident_label_pools_before_it_decides() -> None:
    low, high = scores(size=16)
    assert torch.equal(confident_label(low, high, pool=8), confident_label(F.avg_pool2d(low, 8), F.avg_pool2d(high, 8)))


def test_confident_label_without_a_class_is_background_where_it_is_not_padding() -> None:
    background = torch.ones(1, 1, 2, 2)
    background[..., 1] = 0
    assert confident_label(background, background).tolist() == [[[0, 255], [0, 255]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_confident_label_in_other_precisions(dtype: torch.dtype) -> None:
    low, high = (x.to(dtype) for x in scores())
    assert torch.equal(confident_label(low, high), confident_label(low.double(), high.double()))


def test_confident_label_compiles() -> None:
    compiled = torch.compile(confident_label, fullgraph=True, backend="aot_eager")
    low, high = scores(size=16)
    assert torch.equal(compiled(low, high, pool=8), confident_label(low, high, pool=8))


def test_label_from_cam_equals_the_rules_pixel_by_pixel() -> None:
    cam, keys = torch.rand(2, 3, 6, 7) ** 3, torch.tensor([4, 9, 15])
    label = confident_label_from_cam(cam, fg=0.3, bg=0.05, keys=keys)
    top, index = cam.max(1)
    expected = torch.where(top > 0.3, keys[index], torch.where(top > 0.05, 255, 0))
    assert torch.equal(label, expected)
    assert {0, 255} < set(label.unique().tolist())


def test_label_from_cam_without_a_class_is_background() -> None:
    image = torch.randint(0, 256, (1, 3, 5, 5))
    for crf in (None, DenseCRF(IRN_CRF)):
        assert not confident_label_from_cam(torch.zeros(1, 0, 5, 5), image, crf=crf).any()


def test_label_from_cam_of_zeros_is_background() -> None:
    image = torch.randint(0, 256, (1, 3, 5, 5))
    assert not confident_label_from_cam(torch.zeros(1, 2, 5, 5), image, crf=DenseCRF(IRN_CRF)).any()


class FixedCRF(DenseCRF):
    """Counts lattices, and answers with given masks whatever the unaries are."""

    def __init__(self, *masks: Tensor) -> None:
        super().__init__(IRN_CRF)
        self.masks, self.prepared = list(masks), 0

    def prepare(self, image: Tensor) -> int:
        self.prepared += 1
        return self.prepared

    def forward(self, image: int, unary: Tensor) -> Tensor:
        return F.one_hot(self.masks.pop(0), unary.shape[1]).movedim(-1, 1).float()


def test_label_from_cam_shares_the_lattice_and_lets_the_class_win() -> None:
    certain, possible = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 2, 0, 2]]])
    crf = FixedCRF(certain, possible)
    image = torch.randint(0, 256, (1, 3, 1, 4))
    label = confident_label_from_cam(torch.rand(1, 2, 1, 4), image, crf=crf, keys=torch.tensor([5, 8]))
    assert label.tolist() == [[[0, 255, 5, 5]]]
    assert crf.prepared == 1


def test_label_from_cam_with_a_crf_follows_the_edges_of_the_image() -> None:
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., 8:] = 255
    cam = torch.zeros(1, 1, 16, 16)
    cam[..., 9:] = 0.9
    cam[..., 3, 3] = 0.9  # a speck on the other side
    label = confident_label_from_cam(cam, image, crf=DenseCRF(IRN_CRF))
    assert not label[..., :8].any()
    assert bool((label[..., 8:] == 1).all())


def test_label_from_cam_of_a_batch_equals_that_of_its_images() -> None:
    cam, image = torch.rand(2, 2, 9, 9), torch.randint(0, 256, (2, 3, 9, 9))
    crf = DenseCRF(IRN_CRF)
    both = confident_label_from_cam(cam, image, crf=crf)
    for i in range(2):
        assert torch.equal(both[i : i + 1], confident_label_from_cam(cam[i : i + 1], image[i : i + 1], crf=crf))


CAM = torch.rand(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: confident_label(CAM[0], CAM[0]), ValueError, r"low_scores: expected shape \(B, 1\+K, H, W\)"),
        (lambda: confident_label(CAM, CAM[:, :1]), ValueError, r"high_scores: expected shape \(1, 2, 4, 4\) to match"),
        (
            lambda: confident_label(CAM[:, :0], CAM[:, :0]),
            ValueError,
            r"low_scores: expected the background at channel 0",
        ),
        (lambda: confident_label(CAM.long(), CAM), TypeError, r"low_scores: expected a floating-point tensor"),
        (lambda: confident_label_from_cam(CAM[0]), ValueError, r"cam: expected shape \(B, K, H, W\), got \(2, 4, 4\)"),
        (lambda: confident_label_from_cam(CAM, fg=0.1, bg=0.2), ValueError, r"bg: expected at most fg = 0.1, got 0.2"),
        (lambda: confident_label_from_cam(CAM, crf=DenseCRF()), ValueError, r"image: expected .* got None"),
        (
            lambda: confident_label_from_cam(CAM, torch.zeros(1, 3, 4, 5), crf=DenseCRF()),
            ValueError,
            r"image: expected shape \(1, 3, 4, 4\) to match cam",
        ),
        (lambda: confident_label_from_cam(CAM, keys=torch.arange(3)), ValueError, r"keys: expected shape \(2,\)"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_seed_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
