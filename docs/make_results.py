"""Write docs/results.md from finished runs, so that no figure in it is typed by hand.

python docs/make_results.py [runs/cam-s0 runs/irn-s0 ...]

What the table needs of each run folder is kept in docs/data/runs, so that a new run does not need the folders of the
old ones: a run of the same name replaces its record, the others stay.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import yaml

from recipes.pipeline.evaluation import Measurement
from recipes.pipeline.report import repeat_command
from recipes.pipeline.tables import duration

COLUMNS = (("seed", "seed"), ("seed", "val"), ("mask", "seed"), ("mask+crf", "seed"), ("segmentation", "val"))
FIRST = ("cam", "rw", "irn")  # in the table, before the others by name
RECORDS = Path(__file__).with_name("data") / "runs"
LISTS = {"seed": "train", "val": "val"}
INTRODUCTION = """# Results on photographs

Measured by `recipes` on real PASCAL VOC 2012 photographs, preset `small`: 1,523 images with a cat, cow, dog, horse
or sheep (people too), scaled to 400 pixels, classes cat, cow, dog, horse, person, sheep; pixels of VOC's other
classes count as background, 255 is left out. 1,303 images train, with their image tags only; seeds and masks are
measured on those 378 of them that are in VOC's own train list and so have hand-made masks, the segmentation on 220
images of VOC's val list. The names are in [data/voc12_animals](data/voc12_animals), so whoever has VOC 2012 can
repeat the table (`--train-list`, `--seed-list`, `--val-list`).

mIoU is in percent, over background and six classes, from one confusion matrix over the split. *Seed*: the CAM
against a constant background score. *Mask*: after the method's refinement (for `cam` there is none). *+ CRF*: masks
after the dense CRF with IRN's settings; these train the segmentation network (DeepLabV3+, EfficientNet-Lite0),
tested over three scales and mirror images, without CRF. Thresholds are fixed: 0.25 for seeds (it was the best in an
earlier trial on these photographs, see the oracle for what that is worth), 0.25 after IRN's walk as published; RW's
background score walks along and needs none. In brackets, the oracle: the best threshold, found with the ground
truth of the same split. No checkpoint was chosen on pixel labels: each run takes its last step. A dash is a stage
that was not run.

The runs shared their two cores with tests and other work: times are upper bounds, and those of a stage can differ
nearly threefold between runs (the second `irn` run had the machine nearly to itself). A run that continues another's
classifier counts its time too.

Both systems lift the plain CAMs above what the dense CRF alone gives them, with either random seed. RW's masks are
better than IRN's here, the reverse of what was published with larger backbones. Two differences may explain it: RW
fine-tunes the backbone of its affinity network, and starts it from the classifier, while IRN's stays frozen under
heads that take 243 steps (the published schedule has 990) at the released momentum of 1e-4; and RW's background
competes in the walk, while IRN's is a constant that was fixed for ResNet-50. Neither was tested by itself.

Of the systems that train the classifier differently, all on the same backbone, crops and five epochs of tags:

- `recam` fine-tunes the classifier of `cam` for four more epochs. Its maps are better than the plain ones on both
  lists, and so are the masks that IRN makes of them (at ReCAM's thresholds for confident areas and walk). No plain
  classifier was trained for nine epochs to tell how much of that is the longer training.
- `wood` fine-tunes for two more epochs, with 95 photographs from COCO without any of the classes as its
  out-of-distribution images. The gain on the train list is under two points, and a second random seed was not run.
- `c2am` leaves the CAMs as they are and replaces the constant background score by a cue learnt without labels. The cue
  has been through the CRF, so that a second CRF adds little, and against `cam` with a CRF it loses: it is no better
  than its backbone, which here has seen ImageNet's classes and is trained for 100 steps of 64 images, where the paper
  has a self-supervised ResNet-50, 128 images and a saliency network on top. The row was made while the last stages of
  the backbone still trained; the preset now keeps all of it as pretrained, and has not been run again (nor has `rca`,
  which was given these maps).
- `rca` needs saliency and was given that of `c2am`; its row is not image tags alone. Its maps are the maximum over the
  epochs of one view of 224 pixels, without scales and mirror images, and cover too much: their best threshold is far
  above the fixed one. Masks leave some pixels undecided, which count as wrong.
- `spatial_bce` fails with these settings: in 243 steps it gives up whole classes (cow, dog, horse), whose empty masks
  are then the prior of its second phase. Pixels of a present class are only held to a share of the image, while those
  of absent classes are pushed down one by one, so that silence is cheap for classes that are easily confused.
- `aeft` and `occse` lost to the plain CAM in first runs. AEFT's triplets made its maps spread over the background, and
  OC-CSE's second network had not learnt the tags by the end. After those figures were seen their presets were changed
  (maps of stride 16 for AEFT's pyramid, the classifier's weights as the start of OC-CSE's second network); they have
  not been run again and have no row.
"""


def main(folders: list[Path]) -> None:
    """Keep the records of ``folders`` and render all that there are into results.md beside this file."""
    for folder in folders:
        keep(folder)
    runs = sorted((Run(file) for file in RECORDS.glob("*.json")), key=lambda run: run.order)
    lines = [INTRODUCTION, "## mIoU\n"]
    lines += [
        "| run | " + " | ".join(f"{what}, {LISTS[split]}" for what, split in COLUMNS) + " | time | processor | memory |"
    ]
    lines += ["| --- " + "| --: " * (len(COLUMNS) + 3) + "|"]
    for run in runs:
        cells = [run.cell(what, split) for what, split in COLUMNS]
        lines.append(f"| {run.name} | " + " | ".join(cells) + f" | {run.time} | {run.processor} | {run.memory} |")
    lines += ["", *(f"- {run.note}" for run in runs if run.note), ""]
    for what, split in COLUMNS:
        chosen = [(run, m) for run in runs if (m := run.get(what, split)) is not None]
        if not chosen:
            continue
        classes = list(chosen[0][1].iou)
        lines += [f"## IoU per class: {what}, {chosen[0][1].images} {LISTS[split]} images\n"]
        lines += ["| run | mIoU | " + " | ".join(classes) + " |", "| --- |" + " --: |" * (1 + len(classes))]
        lines += [
            f"| {run.name} | {number(m.miou)} | " + " | ".join(map(number, m.iou.values())) + " |" for run, m in chosen
        ]
        lines.append("")
    lines += ["## Seconds per stage, by the clock\n", "| run | stages |", "| --- | --- |"]
    for run in runs:
        stages = ", ".join(f"{name} {values['seconds']:.0f}" for name, values in run.stages.items())
        lines.append(f"| {run.name} | {stages} |")
    lines += ["", "## Conditions\n", ", ".join(f"{key} {value}" for key, value in runs[0].machine.items()) + ".", ""]
    lines += ["```bash", *(run.command for run in runs), "```", ""]
    Path(__file__).with_name("results.md").write_text("\n".join(lines))


def keep(folder: Path) -> None:
    """Write ``data/runs/NAME.json``: metrics without their curves, and the command that made them."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    places = {"data": "voc:PATH", "until": None}
    for key, place in (("outside", "FOLDER"), ("saliency", None), ("reuse", None)):
        if isinstance(config.get(key), str):
            places[key] = place or f"runs/{Path(config[key]).name}"
    record = {key: metrics[key] for key in ("recipe", "seed", "stages", "measurements", "machine")}
    record["measurements"] = [{**m, "curve": []} for m in record["measurements"]]
    record["reused"] = Path(metrics["reused"]).name if "reused" in metrics else None
    record["command"] = repeat_command({**config, **places, "out": f"runs/{folder.name}"})
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{folder.name}.json").write_text(json.dumps(record, indent=1) + "\n")


class Run:
    """One record."""

    def __init__(self, file: Path) -> None:
        record = json.loads(file.read_text())
        self.name, self.machine, self.command = file.stem, record["machine"], record["command"]
        self.stages = record["stages"]
        self.measured = [Measurement.from_dict(values) for values in record["measurements"]]
        first = FIRST.index(record["recipe"]) if record["recipe"] in FIRST else len(FIRST)
        self.order = (first, record["recipe"], record["seed"], self.name)
        self.time = duration(sum(stage["seconds"] for stage in self.stages.values()))
        busy = [stage.get("cpu_seconds") for stage in self.stages.values()]
        self.processor = "-" if None in busy else duration(sum(busy))
        self.memory = f"{max(stage['peak_mb'] for stage in self.stages.values()) / 1000:.1f} GB"
        reused = record["reused"]
        self.note = (
            reused and f"{self.name} takes what it has in common with {reused} from there; it counts in both times."
        )

    def get(self, what: str, split: str, oracle: bool = False) -> Measurement | None:
        """The measurement of ``what`` on ``split``."""
        return next((m for m in self.measured if (m.what, m.split, m.oracle) == (what, split, oracle)), None)

    def cell(self, what: str, split: str) -> str:
        """A figure, with the oracle in brackets where there is one."""
        fixed, oracle = self.get(what, split), self.get(what, split, oracle=True)
        if fixed is None:
            return "-"
        return number(fixed.miou) + (f" ({number(oracle.miou)} at {oracle.threshold:g})" if oracle is not None else "")


def number(value: float) -> str:
    """One decimal."""
    return "-" if math.isnan(value) else f"{value:.1f}"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
