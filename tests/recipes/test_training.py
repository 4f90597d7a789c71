import json
import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors

from recipes.pipeline.data import load_dataset
from recipes.pipeline.run import Run, RunConfig
from recipes.pipeline.training import (
    AdamSchedule,
    FramedCrops,
    Moment,
    RandomLongSide,
    RandomScale,
    Schedule,
    _save,
    crop_transform,
    fit,
    poly_sgd,
    two_speed_groups,
    warmup_adamw,
)

SCHEDULE = Schedule(epochs=3, batch_size=4, lr=0.1, head_lr=0.5)


class NoisyPoints(Dataset):
    """Points whose noise is drawn anew each time, as augmentation is."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.full((3,), float(index)) / 10
        return {"x": x + 0.1 * torch.randn(3), "y": x.sum()[None]}


def small_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def squared_error(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def make_run(folder: Path, *, workers: int = 0, **options: object) -> Run:
    dataset = SimpleNamespace(train=(), seed=(), val=(), classes=("cat",))
    config = RunConfig(out=folder, workers=workers, **options)
    return Run("test", config, Fabric(accelerator="cpu", devices=1), dataset, folder)


def train(run: Run, loss_of=squared_error, schedule: Schedule = SCHEDULE, **options: object) -> dict[str, Tensor]:
    model = small_model()
    groups = two_speed_groups(model, [model[2]], schedule)
    fit(run, "points", model, NoisyPoints(), loss_of, groups, schedule, checkpoint_seconds=0, **options)
    return model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_norms_that_have_seen_a_nan_are_never_written(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(2)
    model.running_mean[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 weights are not finite, e.g. running_mean"):
        _save(tmp_path / "a.pt", model)
    assert not list(tmp_path.iterdir())


def test_what_a_training_costs_is_recorded_on_the_way_and_counted_once(tmp_path: Path) -> None:
    run, began, on_the_way = make_run(tmp_path), time.perf_counter(), []

    def slow_error(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        time.sleep(0.1)
        on_the_way.append(run.metrics["stages"].get("points", {}).get("seconds", 0.0))
        return squared_error(model, batch, at)

    with run.stage("points", "Points"):
        train(run, slow_error)
    costs, steps = run.metrics["stages"]["points"], len(on_the_way)
    assert on_the_way == sorted(on_the_way)
    assert on_the_way[1] >= 0.1  # what a killed run would have left
    assert 0.1 * steps <= costs["seconds"] <= time.perf_counter() - began + 0.01 * steps  # each record is rounded
    assert costs["peak_mb"] > 100


@pytest.mark.parametrize("decay", ["cosine", "poly"])
def test_adamw_rises_then_falls_to_its_floor(decay: str) -> None:
    schedule = AdamSchedule(epochs=1, batch_size=1, lr=0.1, head_lr=0.5, warmup=0.2, floor=0.1, decay=decay)
    parameter = nn.Parameter(torch.ones(1))
    optimizer, scheduler = warmup_adamw([{"params": [parameter], "lr": 0.5}], 20, schedule)
    rates = []
    for _ in range(25):
        rates.append(scheduler.get_last_lr()[0])
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    done = 10 / 20
    falling = {"cosine": 0.5, "poly": 1 - done}[decay]
    assert rates[10] == pytest.approx(0.5 * (0.1 + 0.9 * falling))
    assert rates[19:] == [rates[19]] * 6
    assert 0.05 < rates[19] < 0.08


def test_adam_groups_decay_matrices_only() -> None:
    schedule = AdamSchedule(epochs=1, batch_size=1, lr=0.1, head_lr=0.5)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    model.prefix = nn.Parameter(torch.zeros(1, 2, 4))
    model[0].bias.requires_grad_(False)
    groups = two_speed_groups(model, [model[2], model.prefix], schedule)
    seen = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert seen == {(0.1, 0.05): 1, (0.1, 0.0): 2, (0.5, 0.05): 1, (0.5, 0.0): 2}


def test_adamw_killed_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    schedule = AdamSchedule(epochs=3, batch_size=4, lr=0.01, head_lr=0.05)
    whole = train(make_run(tmp_path / "whole"), schedule=schedule)

    def interrupted(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        if at.step == 4:
            raise KeyboardInterrupt
        return squared_error(model, batch, at)

    with pytest.raises(KeyboardInterrupt):
        train(make_run(tmp_path / "cut"), interrupted, schedule)
    resumed = train(make_run(tmp_path / "cut"), schedule=schedule)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("old", [False, True], ids=["whole", "without-scale"])
def test_the_scale_of_half_precision_is_kept_with_the_rest(old: bool, tmp_path: Path) -> None:
    def half_run(name: str) -> Run:
        run = make_run(tmp_path / name)
        run.fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu")])
        return run

    scales, killed_at = [], None

    def large_error(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        if at.step == killed_at:
            raise KeyboardInterrupt
        scales.append(run.fabric.strategy.precision.scaler.get_scale())
        return 64 * squared_error(model, batch, at)  # overflows at the first scale

    run = half_run("whole")
    whole = train(run, large_error)
    first = list(scales)
    assert first[-1] < first[0] == 2.0**16
    run.path("checkpoints", "points.pt").unlink()
    scales.clear()
    assert same(train(run, large_error), whole)
    assert scales == first, "whatever was trained before in this process"
    run, killed_at = half_run("killed"), 3
    with pytest.raises(KeyboardInterrupt):
        train(run, large_error)
    if old:
        partial = run.path("checkpoints", "points.partial.pt")
        torch.save({k: v for k, v in torch.load(partial, weights_only=True).items() if k != "precision"}, partial)
    run, killed_at = half_run("killed"), None
    scales.clear()
    resumed = train(run, large_error)
    assert scales[0] == (2.0**16 if old else first[3])
    assert old or (same(resumed, whole) and scales == first[3:])


def test_poly_sgd_falls_to_its_last_value_and_stays() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scheduler = poly_sgd([{"params": [parameter], "lr": 0.2}], 4, momentum=0.9)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2 * (1 - t / 4) ** 0.9 for t in (0, 1, 2, 3, 3, 3)])


@pytest.mark.parametrize("warmup", [4, 6])
def test_a_warmup_may_take_all_steps(warmup: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scheduler = poly_sgd([{"params": [parameter], "lr": 1.0}], 4, momentum=0.9, warmup=warmup)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 + 0.9 * t / warmup for t in (0, 1, 2, 3, 3, 3)])


def test_two_speed_groups_leave_out_frozen_layers_and_can_double_biases() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    groups = two_speed_groups(model, [model[2]], SCHEDULE, double_biases=True)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {
        id(model[1].weight): (0.1, 1e-4),
        id(model[1].bias): (0.2, 0.0),
        id(model[2].weight): (0.5, 1e-4),
        id(model[2].bias): (1.0, 0.0),
    }


def test_a_parameter_can_be_a_head_of_either_schedule() -> None:
    model = nn.Linear(2, 1)
    for schedule in (SCHEDULE, AdamSchedule(epochs=1, batch_size=1, lr=0.1, head_lr=0.5)):
        groups = two_speed_groups(model, [model.bias], schedule)
        assert {id(p): group["lr"] for group in groups for p in group["params"]} == {
            id(model.weight): 0.1,
            id(model.bias): 0.5,
        }


def test_killed_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = train(make_run(tmp_path / "whole"))
    calls = 0

    def killed_at_the_fourth_step(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return squared_error(model, batch, at)

    run = make_run(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        train(run, killed_at_the_fourth_step)
    partial = run.path("checkpoints", "points.partial.pt")
    assert torch.load(partial, weights_only=True)["step"] == 3
    resumed_steps = 0

    def counted(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        nonlocal resumed_steps
        resumed_steps += 1
        return squared_error(model, batch, at)

    assert same(train(run, counted), whole)
    assert resumed_steps == 6 - 3
    assert not partial.exists()
    curves = [(tmp_path / name / "curves" / "points.jsonl").read_text() for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert [json.loads(line)["step"] for line in curves[0].splitlines()] == [0, 5]


def test_loss_is_told_where_the_training_stands(tmp_path: Path) -> None:
    seen = []

    def noted(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        seen.append(at)
        return squared_error(model, batch, at)

    train(make_run(tmp_path), noted)  # 10 points, batches of 4: two steps an epoch
    assert seen == [Moment(step, 6, step // 2, 3, 2) for step in range(6)]


def test_the_weights_with_the_highest_score_are_left_also_by_a_run_that_was_killed(tmp_path: Path) -> None:
    scores, left = {1: 0.5, 2: 0.9, 4: 0.9}, {}  # of equals the first
    killed_at: int | None = None

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        assert model.training
        if at.step == killed_at:
            raise KeyboardInterrupt
        if at.step == 3:
            left.update({key: value.clone() for key, value in model.state_dict().items()})
        return squared_error(model, batch, at)

    last = train(make_run(tmp_path / "last"), loss_of)
    for killed_at in (None, 5):
        run = make_run(tmp_path / str(killed_at))
        with pytest.raises(KeyboardInterrupt) if killed_at else nullcontext():
            train(run, loss_of, choose=lambda at: scores.get(at.step))
        killed_at = None
        chosen = train(run, loss_of, choose=lambda at: scores.get(at.step))
        assert same(chosen, {key.removeprefix("_forward_module."): value for key, value in left.items()})
        assert not same(chosen, last)
        assert run.metrics["chosen"] == {"points": {"step": 2, "score": 0.9}}


def test_where_in_an_epoch_a_step_is() -> None:
    moments = [Moment(step, 5, step // 3, 2, 3) for step in range(5)]
    assert [round(at.in_epoch, 2) for at in moments] == [0.33, 0.67, 1.0, 0.33, 0.67]
    assert [at.last for at in moments] == [False] * 4 + [True]


def test_finished_training_is_loaded_not_repeated(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = train(run)

    def never(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        raise AssertionError

    left_over = run.path("checkpoints", "points.partial.pt")
    left_over.write_bytes(b"of a run killed right after its last checkpoint")
    assert same(train(run, never), first)
    assert not left_over.exists()


def test_result_does_not_depend_on_loader_processes(tmp_path: Path) -> None:
    assert same(train(make_run(tmp_path / "a", workers=0)), train(make_run(tmp_path / "b", workers=2)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_loaders_need_not_pickle_the_data_set(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unpicklable(NoisyPoints):
        def __init__(self) -> None:
            self.own = lambda index: {"worker": torch.tensor(get_worker_info() is not None), "index": index}

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {**super().__getitem__(index), **self.own(torch.tensor(index))}

    in_workers = []

    def noted(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        in_workers.append(bool(batch["worker"].all()))
        return squared_error(model, batch, at)

    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    model = small_model()
    run, groups = make_run(tmp_path, workers=1), two_speed_groups(model, [], SCHEDULE)
    monkeypatch.setattr(sys, "platform", platform)
    try:
        fit(run, "points", model, Unpicklable(), noted, groups, SCHEDULE)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert in_workers == [platform == "linux"] * 6


def test_another_seed_gives_another_result(tmp_path: Path) -> None:
    assert not same(train(make_run(tmp_path / "a", seed=0)), train(make_run(tmp_path / "b", seed=1)))


def test_max_steps_cuts_training_short_even_with_fewer_images_than_a_batch(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=2)
    train(run, schedule=Schedule(epochs=3, batch_size=16, lr=0.1, head_lr=0.5))
    curve = run.path("curves", "points.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve] == [0, 1]


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="points: the loss is nan at step 0; lower the learning rate"):
        train(make_run(tmp_path), lambda model, batch, at: squared_error(model, batch, at) * float("nan"))


def test_a_checkpoint_of_another_network_is_told_with_its_first_key(tmp_path: Path) -> None:
    run, others = make_run(tmp_path), {**small_model().state_dict(), "0.bias": torch.ones(9)}
    file = run.path("checkpoints", "points.pt")
    file.parent.mkdir()
    missing, size = 'Missing key.s. in state_dict: "0.weight", ...', "size mismatch for 0.bias: .*"
    for state, told in (({}, missing), (others, size)):
        torch.save({"model": state}, file)
        with pytest.raises(ValueError, match=rf"points.pt: cannot be read .*for Sequential: {told}.; it is damaged"):
            train(run)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one = train_without_dropout(make_run(tmp_path / "one"))
    script = (
        "import sys; from pathlib import Path; from lightning_fabric import Fabric\n"
        "from tests.recipes.test_training import *\n"
        "fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp'); fabric.launch()\n"
        "run = make_run(Path(sys.argv[1])); run.fabric = fabric\n"
        "train_without_dropout(run)\n"
    )
    file = tmp_path / "two.py"
    file.write_text(script)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(file), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two" / "checkpoints" / "points.pt", weights_only=True)["model"]
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=5e-7)  # measured: 6e-8


def train_without_dropout(run: Run) -> dict[str, Tensor]:
    """Dropout differs between one process and two; nothing else may."""
    model = small_model()
    model[1] = nn.Identity()
    fit(run, "points", model, NoisyPoints(), squared_error, two_speed_groups(model, [], SCHEDULE), SCHEDULE)
    return model.state_dict()


def test_crops_pad_images_with_zero_and_masks_with_ignore() -> None:
    transform = crop_transform(RandomScale(1.0, 1.0), 12, (0.5,) * 3, (0.5,) * 3)
    image = tv_tensors.Image(torch.full((3, 8, 10), 255, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.ones(1, 8, 10, dtype=torch.uint8))
    image, mask = transform(image, mask)
    assert image.shape == (3, 12, 12)
    inside = mask[0] == 1
    assert inside.sum() == 80
    assert (mask[0][~inside] == 255).all()
    assert (image[0][inside] == 1).all()
    assert (image[0][~inside] == 0).all()


def test_crops_say_which_part_is_not_padding() -> None:
    data = load_dataset("demo:tiny")
    transform = crop_transform(RandomScale(0.5, 0.5), 128, (0.5,) * 3, (0.5,) * 3, mask_fill=0)
    crops = FramedCrops(data, data.train, transform)
    for index in range(4):
        item = crops[index]
        x1, y1, x2, y2 = item["region"].tolist()
        height, width = data.size(data.train[index])
        assert (y2 - y1, x2 - x1) == (round(height / 2), round(width / 2))
        assert item["inside"].shape == (1, 128, 128)
        assert item["inside"][:, y1:y2, x1:x2].all()
        assert item["inside"].sum() == (y2 - y1) * (x2 - x1)
        assert not item["image"][:, item["inside"][0] == 0].any(), "padded with 0 after the normalisation"


def test_random_long_side_keeps_the_aspect_and_the_range() -> None:
    sides = [
        RandomLongSide(20, 40)(tv_tensors.Image(torch.zeros(3, 50, 100, dtype=torch.uint8))).shape for _ in range(20)
    ]
    assert all(20 <= width <= 40 and abs(height - width / 2) <= 0.5 for _, height, width in sides)
    assert len(set(sides)) > 1
