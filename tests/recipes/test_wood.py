"""W-OoD's fine-tuning: what can't work is told before the classifier is trained; see also `test_outside.py`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import vitpcm, wood
from recipes.pipeline import oracle
from recipes.pipeline.cams import write_cams
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier, build_trunk
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import Moment
from wsss_modules import FeatureCentreBank


def test_a_checkpoint_chosen_on_masks_is_judged_by_the_cams_at_their_best_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(wood.PRESETS["tiny"], out=tmp_path, accelerator="cpu", workers=0)
    run = start("wood", config)
    classifier = Classifier(build_trunk("tf_efficientnet_lite0", "random"), len(run.dataset.classes))
    net = wood.WOoDNet(classifier, FeatureCentreBank(1, 1, 1)).train()
    score = wood.oracle(run, net, config)
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "measure_seeds", lambda *_, **__: SimpleNamespace(best=SimpleNamespace(miou=1.0)))
        moments = [Moment(step, 120, step // 60, 2, 60) for step in range(120)]
        assert [at.step for at in moments if score(at)] == [110, 119]  # the last quarter begins with step 105
    write_cams(run, net, run.seeds, config.cams)
    measure_cams(run, config.threshold)
    (best,) = (m["miou"] for m in run.metrics["measurements"] if m["threshold_from"] != "fixed")
    assert score(Moment(119, 120, 1, 2, 60)) == pytest.approx(best, abs=0.01)  # 9e-4 measured: half precision


def test_without_masks_to_choose_by_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_masks(run: Run, names: Sequence[str]) -> tuple[str, ...]:
        return ()

    monkeypatch.setattr(oracle, "with_truth", without_masks)
    for recipe, split in ((wood, "seed"), (vitpcm, "val")):
        config = replace(recipe.PRESETS["tiny"], out=tmp_path / split, accelerator="cpu")
        with pytest.raises(
            ValueError, match=f"oracle_checkpoint_selection: demo:tiny has no masks of the {split} list"
        ):
            recipe.main(replace(config, oracle_checkpoint_selection=True))
        assert not (tmp_path / split / "checkpoints").exists()


def test_a_class_to_ignore_that_the_data_set_lacks_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Begun

    tiny = wood.PRESETS["tiny"]
    config = replace(tiny, out=tmp_path / "run", accelerator="cpu", wood=replace(tiny.wood, ignore_top=("botle",)))
    monkeypatch.setattr(wood, "train_classifier", stop)
    with pytest.raises(Begun):
        wood.main(config)
    assert "has no botle" in capsys.readouterr().out
