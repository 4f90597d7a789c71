import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules import BoundaryHead, DisplacementHead, IRNHead, MeanShift, edge_displacement_inference

NARROW = (4, 8, 12, 16, 16)
RELEASED = (4, 4, 8, 16, 16)
LITE0 = ((16, 24, 40, 112, 320), (2, 4, 8, 16, 32))


def feature_maps(size: tuple[int, int], channels=NARROW, strides=RELEASED, batch: int = 2) -> list[Tensor]:
    """Maps of an image of ``size`` pixels, ceil(size / stride) cells each."""
    return [torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, strides, strict=True)]


def narrow_head(**options: bool) -> IRNHead:
    return IRNHead(NARROW, edge_width=4, displacement_widths=(8, 16, 16), **options)


def unit(x: Tensor, level: nn.Module, up: int) -> Tensor:
    x = F.group_norm(F.conv2d(x, level.conv.weight), level.norm.num_groups, level.norm.weight, level.norm.bias)
    return F.relu(F.interpolate(x, scale_factor=up, mode="bilinear", align_corners=False) if up > 1 else x)


@pytest.mark.parametrize("size", [(52, 44), (40, 60), (33, 1), (7, 65)])
def test_heads_follow_the_released_layout_for_any_size(size: tuple[int, int]) -> None:
    head, maps = narrow_head(), feature_maps(size)
    h, w = maps[1].shape[2:]
    edges = [unit(x, level, up) for x, level, up in zip(maps, head.boundary.levels, (1, 1, 2, 4, 4), strict=True)]
    edge = head.boundary.classifier(torch.cat([x[..., :h, :w] for x in edges], 1))
    d = head.displacement
    d1, d2, d3, d4, d5 = (unit(x, level, up) for x, level, up in zip(maps, d.levels, (1, 1, 1, 2, 2), strict=True))
    h3, w3 = d3.shape[2:]
    d6 = unit(torch.cat([d3, d4[..., :h3, :w3], d5[..., :h3, :w3]], 1), d.merge, 2)[..., :h, :w]
    displacement = d.regressor(unit(torch.cat([d1, d2, d6], 1), d.project, 1))
    out = head(maps)
    torch.testing.assert_close(out.edge_logits, edge)
    torch.testing.assert_close(out.displacement, displacement)


@pytest.mark.parametrize("size", [(64, 64), (97, 61)])
def test_heads_serve_a_backbone_of_strides_2_to_32(size: tuple[int, int]) -> None:
    channels, strides = LITE0
    head = IRNHead(channels, strides, edge_width=4, displacement_widths=(8, 16, 16))
    out = head(feature_maps(size, channels, strides))
    cells = -(-size[0] // 4), -(-size[1] // 4)
    assert out.edge_logits.shape == (2, 1, *cells)
    assert out.displacement.shape == (2, 2, *cells)


def test_heads_serve_a_backbone_of_one_stride() -> None:
    head = IRNHead((4,) * 5, (16,) * 5, edge_width=4, displacement_widths=(8, 16, 16))
    assert head(feature_maps((48, 32), (4,) * 5, (16,) * 5)).displacement.shape == (2, 2, 3, 2)


@pytest.mark.parametrize("size", [(26, 18), (24, 16)])
def test_a_finer_map_is_pooled_to_the_output_grid(size: tuple[int, int]) -> None:
    head, same = BoundaryHead(NARROW, (2, 4, 8, 16, 16), width=4), BoundaryHead(NARROW, RELEASED, width=4)
    same.load_state_dict(head.state_dict())
    first, *others = feature_maps(size, NARROW, (2, 4, 8, 16, 16))
    even = F.pad(first, (0, first.shape[3] % 2, 0, first.shape[2] % 2), mode="replicate")
    torch.testing.assert_close(head([first, *others]), same([F.avg_pool2d(even, 2), *others]))


def test_the_default_layout_is_that_of_resnet50() -> None:
    head = IRNHead()
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    assert shapes["boundary.levels.4.conv.weight"] == (32, 2048, 1, 1)
    assert shapes["boundary.classifier.weight"] == (1, 160, 1, 1)
    assert shapes["displacement.levels.0.conv.weight"] == (64, 64, 1, 1)
    assert shapes["displacement.levels.1.conv.weight"] == (128, 256, 1, 1)
    assert shapes["displacement.merge.conv.weight"] == (256, 768, 1, 1)
    assert shapes["displacement.project.conv.weight"] == (256, 448, 1, 1)
    assert shapes["displacement.regressor.weight"] == (2, 256, 1, 1)
    groups = [module.num_groups for module in head.modules() if isinstance(module, nn.GroupNorm)]
    assert groups == [4] * 5 + [8] + [16] * 6


def test_no_gradient_reaches_the_backbone_unless_asked_for() -> None:
    for detach in (True, False):
        maps = [x.requires_grad_() for x in feature_maps((32, 32))]
        out = narrow_head(detach=detach)(maps)
        (out.edge_logits.sum() + out.displacement.sum()).backward()
        assert all((x.grad is None) == detach for x in maps)


def test_the_branches_share_no_parameter() -> None:
    head = narrow_head()
    head(feature_maps((32, 32))).edge_logits.sum().backward()
    assert all(p.grad is not None for p in head.boundary.parameters())
    assert all(p.grad is None for p in head.displacement.parameters())


def test_evaluation_takes_the_stored_mean_off() -> None:
    head, maps = narrow_head(), feature_maps((45, 38))
    mean = torch.tensor([0.5, -2.0])
    head.mean_shift.running_mean.copy_(mean)
    raw = head.train()(maps).displacement
    torch.testing.assert_close(head.eval()(maps).displacement, raw - mean[:, None, None])
    torch.testing.assert_close(head.displacement.raw(maps), raw)


def test_mean_shift_averages_the_means_of_batches_or_all_cells() -> None:
    fields = [torch.randn(3, 2, 4, 5), torch.randn(1, 2, 6, 6), torch.randn(2, 2, 1, 1)]
    shift = MeanShift()
    means = torch.stack([x.mean((0, 2, 3)) for x in fields])
    torch.testing.assert_close(shift.fit(iter(fields)), means.mean(0))
    cells = torch.cat([x.movedim(1, 0).flatten(1) for x in fields], 1)
    torch.testing.assert_close(shift.fit(fields, weighting="pixel"), cells.mean(1))
    torch.testing.assert_close(shift.running_mean, cells.mean(1))


@pytest.mark.parametrize("weighting", ["batch", "pixel"])
def test_mean_shift_counts_valid_cells_only(weighting: str) -> None:
    field = torch.randn(2, 2, 4, 4)
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[0, :3, :2] = True
    padded = torch.where(valid[:, None], field, float("nan"))
    nothing = (padded, torch.zeros_like(valid))
    mean = MeanShift().fit([(padded, valid), nothing], weighting=weighting)
    torch.testing.assert_close(mean, field[0, :, :3, :2].mean((1, 2)))
    assert torch.equal(MeanShift().fit([nothing], weighting=weighting), torch.zeros(2))


def test_mean_shift_fits_twice_with_the_same_result_and_is_saved() -> None:
    shift, fields = MeanShift().eval(), [torch.randn(2, 2, 3, 3)]
    first = shift.fit(fields)
    assert torch.equal(shift.fit(fields), first)
    again = MeanShift().eval()
    again.load_state_dict(shift.state_dict())
    assert torch.equal(again(fields[0]), shift(fields[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_heads_in_other_precisions(dtype: torch.dtype) -> None:
    head = narrow_head().to(dtype).eval()
    out = head([x.to(dtype) for x in feature_maps((32, 32))])
    assert out.edge_logits.dtype == out.displacement.dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_heads_compile(training: bool) -> None:
    head, maps = narrow_head().train(training), feature_maps((45, 38))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")(maps)
    for got, expected in zip(compiled, head(maps), strict=True):
        torch.testing.assert_close(got, expected)


def released_state(head: IRNHead) -> dict[str, Tensor]:
    """The same values under the names of the released network, the mean shift twice, and a backbone."""
    shapes = head.state_dict()
    names = [f"fc_edge{i}.{j}" for i in range(1, 6) for j in (0, 1)] + [
        f"fc_dp{i}.{j}" for i in range(1, 8) for j in (0, 1)
    ]
    leaves = {"0": ["weight"], "1": ["weight", "bias"]}
    keys = [f"{name}.{leaf}" for name in names for leaf in leaves[name[-1]]]
    keys += ["fc_edge6.weight", "fc_edge6.bias", "fc_dp7.3.weight", "fc_dp7.4.running_mean", "mean_shift.running_mean"]
    state = {key: torch.randn(shapes[IRNHead.released_key(key)].shape) for key in keys}
    state["mean_shift.running_mean"] = state["fc_dp7.4.running_mean"]
    return {**state, "resnet50.conv1.weight": torch.zeros(1), "stage1.0.weight": torch.zeros(1)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoints_load(prefix: str) -> None:
    head = narrow_head()
    state = released_state(head)
    head.load_released_state_dict({prefix + key: value for key, value in state.items()})
    ours = head.state_dict()
    mapped = {IRNHead.released_key(key): value for key, value in state.items()}
    mapped.pop(None)
    assert set(mapped) == set(ours)
    assert all(torch.equal(ours[key], value) for key, value in mapped.items())
    del state["mean_shift.running_mean"]
    head.load_released_state_dict(state)
    del state["fc_dp6.1.bias"]
    with pytest.raises(RuntimeError, match=r"displacement\.merge\.norm\.bias"):
        head.load_released_state_dict(state)


class Cells(nn.Module):
    """A network whose outputs are the pixels at each cell's corner, so that the geometry shows."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = x
        return x[:, :1, ::4, ::4], x[:, 1:, ::4, ::4]


def test_inference_averages_the_logits_of_the_pair() -> None:
    image, net = torch.randn(2, 3, 32, 48), Cells()
    out = edge_displacement_inference(image, net)
    assert net.seen.shape == (4, 3, 32, 48)
    plain, mirrored = image[:, :1, ::4, ::4], image.flip(-1)[:, :1, ::4, ::4].flip(-1)
    torch.testing.assert_close(out.edge, torch.sigmoid((plain + mirrored) / 2))
    assert torch.equal(out.displacement, image[:, 1:, ::4, ::4])


@pytest.mark.parametrize("size", [(45, 38), (1, 1), (16, 17), (64, 80)])
@pytest.mark.parametrize("min_size", [0, 64])
def test_inference_pads_and_cuts_but_never_loses_a_pixel(size: tuple[int, int], min_size: int) -> None:
    image, net = torch.ones(1, 3, *size), Cells()
    out = edge_displacement_inference(image, net, min_size=min_size)
    padded = [max(min_size, -(-n // 16) * 16) for n in size]
    assert list(net.seen.shape[2:]) == padded
    assert net.seen[0, 0].sum() == size[0] * size[1]
    assert out.edge.shape[2:] == (-(-size[0] // 4), -(-size[1] // 4))
    assert bool((out.displacement == 1).all())


def test_inference_of_the_mirror_image_is_the_mirrored_edge() -> None:
    image = torch.randn(1, 3, 32, 32)
    net = nn.Conv2d(3, 3, 4, stride=4)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        y = net(x)
        return y[:, :1], y[:, 1:]

    edge = edge_displacement_inference(image, split).edge
    torch.testing.assert_close(edge_displacement_inference(image.flip(-1), split).edge, edge.flip(-1))


def wrong_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:1, :1, ::4, ::4], x[:, 1:, ::4, ::4]


def too_coarse(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :1, ::8, ::8], x[:, 1:, ::8, ::8]


MAPS = feature_maps((16, 16))
IMAGE = torch.rand(1, 3, 20, 20)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: BoundaryHead((1, 2, 3, 4), RELEASED),
            ValueError,
            r"in_channels, strides: expected five levels, got 4 and 5",
        ),
        (lambda: DisplacementHead(NARROW, (4, 6, 8, 16, 16)), ValueError, r"strides: expected each to be a multiple"),
        (lambda: narrow_head()(MAPS[:4]), ValueError, r"features: expected five maps, got 4"),
        (lambda: narrow_head()([x[0] for x in MAPS]), ValueError, r"features\[0\]: expected shape \(B, C, h, w\)"),
        (
            lambda: narrow_head()([*MAPS[:2], MAPS[2][..., :1], *MAPS[3:]]),
            ValueError,
            r"features\[2\]: .* strides right",
        ),
        (lambda: MeanShift().fit([]), ValueError, r"batches: expected at least one displacement field"),
        (lambda: MeanShift().fit([IMAGE]), ValueError, r"batches: expected shape \(\*, 2, \*, \*\) for this mean"),
        (lambda: MeanShift().fit([IMAGE[:, :2]], weighting="image"), ValueError, r"weighting: expected .* got 'image'"),
        (
            lambda: MeanShift().fit([(IMAGE[:, :2], torch.ones(1, 3, 3).bool())]),
            ValueError,
            r"valid: expected shape \(1, 20, 20\) to match the field",
        ),
        (lambda: edge_displacement_inference(IMAGE[0], Cells()), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (
            lambda: edge_displacement_inference(IMAGE, wrong_batch),
            ValueError,
            r"net \(edge logits\): expected shape \(2, 1",
        ),
        (
            lambda: edge_displacement_inference(IMAGE, too_coarse),
            ValueError,
            r"net \(edge logits\): .* is stride right",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_boundary_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
