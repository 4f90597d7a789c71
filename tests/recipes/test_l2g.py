"""L2G's training step with and without saliency, its views, and its maps at test time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from recipes import l2g
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import saliency_source
from recipes.pipeline.training import Moment

NETWORK = replace(l2g.PRESETS["tiny"].l2g, weights="random", view=64, crop=48, side=(64, 96))


def step_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, saliency: bool = True, **options: Any
) -> tuple[Run, l2g.L2GNet, Any, dict[str, Tensor]]:
    """The run, the network, the terms of a step without any training, and its batch."""
    caught: dict[str, Any] = {}
    monkeypatch.setattr(l2g, "fit", lambda run, stage, net, views, loss_of, *_: caught.update(v=views, l=loss_of))
    config = l2g.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu", l2g=replace(NETWORK, **options))
    run = start("l2g", config, takes=())
    torch.manual_seed(0)
    net = l2g.train_l2g(run, None, config.l2g, saliency_source(run) if saliency else None)
    items = [caught["v"][i] for i in range(2)]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return run, net, caught["l"](net, batch, Moment(0, 10, 0, 2, 5)), batch


@pytest.mark.parametrize("saliency", [True, False], ids=["saliency", "tags"])
def test_a_step_teaches_each_network_its_own_part(
    saliency: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, net, terms, batch = step_of(tmp_path, monkeypatch, saliency)
    assert ("saliency" in batch) == saliency
    assert terms.transfer > 0
    torch.testing.assert_close(terms.total, terms.transfer + terms.classification)
    terms.classification.backward(retain_graph=True)
    assert all(value.grad is None for value in net.whole.parameters())
    assert all(value.grad is not None for value in net.local.head.parameters())
    net.zero_grad(set_to_none=True)
    terms.transfer.backward()
    assert all(value.grad is None for value in net.local.parameters())
    assert all(value.grad is not None and value.grad.any() for value in net.whole.head.parameters())


def test_a_head_can_start_with_the_maps_of_a_plain_classifier() -> None:
    torch.manual_seed(0)
    weight, features = torch.randn(3, 16, 1, 1), torch.ones(1, 16, 4, 4)  # pixels alike: P(u) is u
    head = l2g.PixelCorrelationCAMHead(16, 3, side_channels=(4, 8)).eval()
    l2g.start_as_classifier(head, weight)
    with torch.no_grad():
        found = head(features, torch.ones(1, 4, 4, 4), torch.ones(1, 8, 4, 4), torch.ones(1, 3, 8, 8)).scores[:, 1:]
    torch.testing.assert_close(found, torch.nn.functional.conv2d(features, weight), rtol=1e-4, atol=1e-4)


def test_saliency_shapes_what_is_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step_of(tmp_path / "plain", monkeypatch)[2]
    with monkeypatch.context() as patch:
        patch.setattr(l2g, "stretched", lambda saliency, stretch: saliency * 0)
        empty = step_of(tmp_path / "empty", patch)[2]
    torch.testing.assert_close(plain.classification, empty.classification)
    assert plain.transfer != empty.transfer


def test_saliency_of_a_view_is_stretched_on_request() -> None:
    saliency = torch.tensor([[[[0.1, 0.2]]], [[[0.0, 0.0]]]])
    assert torch.equal(l2g.stretched(saliency, False), saliency)
    torch.testing.assert_close(l2g.stretched(saliency, True), torch.tensor([[[[0.5, 1.0]]], [[[0.0, 0.0]]]]))


@pytest.mark.parametrize("resize", ["long", "short", "square"])
def test_views_have_their_size_and_saliency_is_cut_as_they_are(resize: str, tmp_path: Path) -> None:
    options = {"resize": resize, "side": (80, 90), "view": 72, "mirror": False}
    trunk = type("Trunk", (), {"mean": (0.0,) * 3, "std": (1.0,) * 3})()
    transform = l2g.view_transform(replace(NETWORK, **options), trunk)
    ramp = torch.linspace(0, 1, 120).expand(60, 120)
    image = tv_tensors.Image((ramp * 255).byte().expand(3, 60, 120))
    view, saliency = transform(image, tv_tensors.Mask(ramp[None].contiguous()))
    assert view.shape == (3, 72, 72)
    assert saliency.shape == (1, 72, 72)
    # saliency is read at the nearest pixel, and the image in steps of 1/255
    torch.testing.assert_close(view[:1].as_subclass(Tensor), saliency.as_subclass(Tensor), rtol=0, atol=0.03)


def test_boxes_are_in_the_corners_or_drawn() -> None:
    corners = l2g.draw_boxes(NETWORK, 2)
    assert corners.shape == (8, 5)
    assert corners[:4, 1:3].tolist() == [[0, 0], [16, 0], [0, 16], [16, 16]]
    drawn = l2g.draw_boxes(replace(NETWORK, corners=False, crops=2), 3)
    assert drawn.shape == (6, 5)
    assert drawn[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_only_the_global_network_is_left_at_test_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, net, _, batch = step_of(tmp_path, monkeypatch)
    maps = l2g.GlobalMaps(net).eval()
    cam = maps(batch["image"]).cam
    assert cam.shape == (2, len(run.dataset.classes), 4, 4)
    torch.testing.assert_close(cam, net.eval().whole(batch["image"]).scores[:, 1:])
    net.local.head.classifier.weight.data.zero_()
    torch.testing.assert_close(maps(batch["image"]).cam, cam)


def test_saliency_is_asked_for_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(l2g.PRESETS["tiny"], out=tmp_path / "run", saliency=str(tmp_path / "nowhere"), accelerator="cpu")
    with pytest.raises(ValueError, match=r"saliency: expected a folder of maps or of a c2am run, found no folder"):
        l2g.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_backbone_than_the_classifiers_is_refused_before_that_is_trained(tmp_path: Path) -> None:
    tiny = l2g.PRESETS["tiny"]
    network = replace(tiny.l2g, backbone="resnet18")
    with pytest.raises(ValueError, match="weights: expected those of resnet18, got a classifier with tf_efficientnet"):
        l2g.main(replace(tiny, out=tmp_path / "run", accelerator="cpu", workers=0, l2g=network))
    assert not (tmp_path / "run" / "checkpoints").exists()
