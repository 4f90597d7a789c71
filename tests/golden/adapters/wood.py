"""W-OoD: class and OoD centres in one table, a missing centre as a row of zeros, scalars of shape (1,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


def there(centres: Tensor) -> Tensor:
    return centres.any(1)


@adapter("wood/kmeans")
def kmeans(case: Case) -> dict[str, Tensor]:
    call, x = case.call, case.inputs["in.x"]
    plain, cosine = (modules.kmeans(x, call["K"], call["Niter"], metric=name) for name in ("euclidean", "cosine"))
    return {
        "out.labels": plain.labels,
        "out.centres": plain.centres,
        "out.labels_cosine": cosine.labels,
        "out.centres_cosine": cosine.centres,
    }


@adapter("wood/cluster_centres")
def cluster_centres(case: Case) -> dict[str, Tensor]:
    features, labels, outside = (case.inputs[f"in.{name}"] for name in ("features_in", "labels_in", "features_ood"))
    bank = modules.FeatureCentreBank(labels.shape[1], case.call["cluster_K"], features.shape[1]).to(features.dtype)
    bank.fit(features, labels, outside, iters=case.call["Niter"])
    return {"out.centres": torch.cat([bank.class_centres, bank.ood_centres])}


@adapter("wood/metric_loss")
def metric_loss(case: Case) -> dict[str, Tensor]:
    features, labels = case.leaf("in.feature"), case.inputs["in.label"]
    of_classes, of_clusters = case.inputs["in.centres_in"], case.inputs["in.centres_ood"]
    topk = case.call["ood_dist_topk"]
    loss = losses.ood_metric_loss(
        features, labels, of_classes, of_clusters, there(of_classes), there(of_clusters), topk=topk
    )
    centres = torch.cat([of_classes, of_clusters])
    distances = modules.centre_distances(features.detach(), centres, there(centres))
    closest = modules.closest_pairs(distances[:, len(of_classes) :], topk, valid=there(of_clusters))
    return {
        "out.sq_dist": distances.square(),
        "out.loss": loss.view(1),
        "out.threshold": closest.threshold.view(1),
        "out.selected": closest.selected | ~there(of_clusters),
        **case.grads(loss),
    }


class TinyClassifier(nn.Module):
    """Convolution, ReLU, mean and a linear layer: the stand-in for the ResNet."""

    def __init__(self, classifier: Tensor) -> None:
        super().__init__()
        classes, channels = classifier.shape
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.classifier = nn.Linear(channels, classes, bias=False)

    def features(self, images: Tensor) -> Tensor:
        return self.conv(images).relu().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def classifier(case: Case) -> TinyClassifier:
    model = case.load(TinyClassifier(case.params["param.classifier.weight"]))
    assert isinstance(model, TinyClassifier)
    return model


def climb(case: Case, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    for _ in range(case.call.get("iterations", 1)):
        images = modules.gradient_climb(model, images, case.call["epsilon"])
    return images


@adapter("wood/ood_loss")
def ood_loss(case: Case) -> dict[str, Tensor]:
    model, images = classifier(case), case.inputs["in.image"]
    climbed = climb(case, model, images)
    logits = model(climbed)
    options = {"ignore_top": (case.call["ignored_top_class"],)}
    loss = losses.ood_negative_loss(logits, **options)
    return {
        "out.image_grad": modules.top_logit_gradient(model, images),
        "out.perturbed": climbed,
        "out.logits": logits,
        "out.keep": losses.ood_negative_loss(logits, **options, reduction="none") > 0,
        "out.loss": loss.view(1),
        **case.grads(loss),
    }


@adapter("wood/wood_objective")
def wood_objective(case: Case) -> dict[str, Tensor]:
    call, model = case.call, classifier(case)
    features = model.features(case.inputs["in.image"])
    logits, ood_logits = model.classifier(features), model(climb(case, model, case.inputs["in.ood_image"]))
    of_classes, of_clusters = case.inputs["in.centres_in"], case.inputs["in.centres_ood"]
    terms = losses.wood_loss(
        logits,
        features,
        ood_logits,
        case.inputs["in.label"],
        of_classes,
        of_clusters,
        there(of_classes),
        there(of_clusters),
        distance_weight=call["distance_lambda"],
        ood_weight=call["ood_coeff"],
        topk=call["ood_dist_topk"],
        ignore_top=(call["ignored_top_class"],),
    )
    values = {"out.loss": terms.total, "out.loss_metric": terms.distance, "out.loss_ood": terms.ood}
    return {**{key: value.view(1) for key, value in values.items()}, "out.logits": logits, **case.grads(terms.total)}
