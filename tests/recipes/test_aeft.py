"""AEFT's network starts with the maps of the plain classifier."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import aeft
from recipes.pipeline.classification import build_classifier, make_trunk
from recipes.pipeline.run import start
from wsss_modules import SoftErase


def test_the_pyramid_starts_with_half_of_the_classifiers_maps(tmp_path: Path) -> None:
    config = aeft.PRESETS["tiny"].gpp
    run = start("aeft", aeft.Config(data="demo:tiny", out=tmp_path, workers=0, accelerator="cpu"))
    classifier = build_classifier(run, replace(config, weights="random")).eval()
    trunk = make_trunk(run, config, config.output_stride, classifier.trunk)
    model = aeft.PyramidClassifier(trunk, len(run.dataset.classes), SoftErase()).eval()
    images = torch.randn(2, 3, 64, 64)
    model.start_as(classifier)
    with torch.no_grad():
        maps = classifier.head.class_maps(classifier.trunk(images).final)  # signed
        torch.testing.assert_close(model(images).cam, maps / 2, rtol=1e-4, atol=1e-5)


def test_too_many_classes_for_the_head_are_told(tmp_path: Path) -> None:
    config = aeft.PRESETS["tiny"].gpp
    run = start("aeft", aeft.Config(data="demo:tiny", out=tmp_path, workers=0, accelerator="cpu"))
    classifier = build_classifier(run, replace(config, weights="random"))
    model = aeft.PyramidClassifier(classifier.trunk, len(run.dataset.classes), SoftErase(), width=3)
    with pytest.raises(ValueError, match="classes: expected at most 1 for a head of 3"):
        model.start_as(classifier)
