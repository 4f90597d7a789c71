"""ReviewKD's student starts the same each time and learns under a teacher that stays what it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import reviewkd
from recipes.pipeline.labels import write_masks
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmenter import Segmenter

TINY = reviewkd.PRESETS["tiny"].student
STUDENT = replace(TINY, network=replace(TINY.network, weights="random"))


def run_in(folder: Path) -> Run:
    return start("reviewkd", reviewkd.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"))


def a_teacher(run: Run) -> Segmenter:
    torch.manual_seed(1)
    return Segmenter(STUDENT.network, 1 + len(run.dataset.classes)).eval()


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_a_shallower_encoder_is_smaller_and_meets_the_teacher_stride_by_stride(tmp_path: Path, depth: int) -> None:
    run = run_in(tmp_path)
    student, teacher = reviewkd.new_student(run, replace(STUDENT, depth=depth)), a_teacher(run)
    pairs, of_student, of_teacher = reviewkd.meeting_stages(student, teacher)
    assert pairs == {3: {1: 1, 2: 2}, 4: {1: 1, 2: 2, 3: 4}, 5: {1: 1, 2: 2, 3: 3, 4: 4}}[depth]
    assert of_student == {3: [24, 40], 4: [24, 40, 112], 5: [24, 40, 112, 320]}[depth]
    assert of_teacher == {3: [24, 40], 4: [24, 40, 320], 5: [24, 40, 112, 320]}[depth]
    sizes = [sum(p.numel() for p in network.encoder.parameters()) for network in (student, teacher)]
    assert sizes[0] < sizes[1] / 3 if depth < 5 else sizes[0] == sizes[1]
    logits, levels = student.eval().with_levels(torch.rand(1, 3, 64, 96))
    assert len(levels) == depth
    assert logits.shape[1] == 1 + len(run.dataset.classes)


def test_networks_of_equal_depth_meet_stage_by_stage_whatever_their_strides() -> None:
    paper = reviewkd.PRESETS["paper"]
    student = replace(paper.student.network, weights="random", output_stride=16)
    teacher = replace(paper.segment, weights="random", encoder="resnet26")  # with the blocks of ResNet-101
    networks = Segmenter(student, 4, depth=paper.student.depth), Segmenter(teacher, 4)
    sides = [[x.shape[-1] for x in network.eval().with_levels(torch.rand(1, 3, 64, 64))[1]] for network in networks]
    assert sides == [[32, 16, 8, 4, 4], [32, 16, 8, 8, 8]]
    pairs, of_student, of_teacher = reviewkd.meeting_stages(*networks)
    assert pairs == {1: 1, 2: 2, 3: 3, 4: 4}
    assert of_student == [64, 128, 256, 512]
    assert of_teacher == [256, 512, 1024, 2048]


def test_levels_come_with_the_logits_of_forward(tmp_path: Path) -> None:
    teacher, images = a_teacher(run_in(tmp_path)), torch.rand(1, 3, 64, 96)
    assert torch.equal(teacher.with_levels(images)[0], teacher(images))
    flat = Segmenter(replace(STUDENT.network, architecture="largefov"), 4).eval()
    assert torch.equal(flat.with_levels(images)[0], flat(images))


@pytest.mark.parametrize(("architecture", "encoder"), [("deeplabv3plus", "resnet18"), ("deeplabv2", "resnet26")])
def test_maps_of_a_resnet_are_those_before_the_relu_that_ends_a_stage(architecture: str, encoder: str) -> None:
    network = Segmenter(replace(STUDENT.network, architecture=architecture, encoder=encoder), 4).eval()
    for module in network.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # timm starts the last of a block at zero, which leaves the shortcut
    images = torch.rand(1, 3, 64, 64)
    logits, maps = reviewkd.unactivated_levels(network, images)
    expected, levels = network.with_levels(images)
    assert torch.equal(logits, expected)
    assert torch.equal(maps[0], levels[0])
    for before, after in zip(maps[1:], levels[1:], strict=True):
        assert before.min() < 0
        assert torch.equal(before.relu(), after)
    sum(x.square().mean() for x in maps).backward()


def test_an_unknown_student_is_told_before_the_teacher_is_trained(tmp_path: Path) -> None:
    student = replace(STUDENT, network=replace(STUDENT.network, architecture="deeplabv9"))
    config = replace(reviewkd.PRESETS["tiny"], out=tmp_path / "run", workers=0, accelerator="cpu", student=student)
    with pytest.raises(ValueError, match="architecture: expected deeplabv3plus"):
        reviewkd.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_teacher_sees_the_images_as_it_is_used_to_and_its_maps_have_unit_size(tmp_path: Path) -> None:
    teacher = a_teacher(run_in(tmp_path))
    student = a_teacher(run_in(tmp_path))
    student.mean, student.std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    image = torch.rand(1, 3, 64, 64)

    def normal(network: Segmenter) -> torch.Tensor:
        return (image - torch.tensor(network.mean).view(3, 1, 1)) / torch.tensor(network.std).view(3, 1, 1)

    ours = reviewkd.Teacher(teacher, student, [2])(normal(student))[0]
    wanted = teacher.with_levels(normal(teacher))[1][2]
    torch.testing.assert_close(ours, wanted / wanted.square().mean().sqrt(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_students_start_alike_and_the_teacher_stays(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_masks(run, run.train, lambda name: torch.from_numpy(run.dataset.mask(name)), "mask_crf")
    teacher = a_teacher(run)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    alone, distilled = reviewkd.new_student(run, STUDENT), reviewkd.new_student(run, STUDENT)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), distilled.parameters(), strict=True))
    reviewkd.train_student(run, alone, None, STUDENT, "student")
    reviewkd.train_student(run, distilled, teacher, STUDENT, "distil")
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())
    stored = torch.load(run.path("checkpoints", "distil.pt"), weights_only=True)["model"]
    assert not any(name.startswith("guide") for name in stored)
    assert any(name.startswith("distiller") for name in stored)
    assert all(torch.equal(stored[f"student.{n}"], v) for n, v in distilled.state_dict().items())
