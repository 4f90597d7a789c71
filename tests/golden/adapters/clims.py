"""CLIMS: similarities as (n, 1, 1), a table of texts for each class that has backgrounds, a stand-in image encoder."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


def matching(case: Case, loss_of: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A matching loss of similarities with the weights and the clamp of the call."""
    call, similarity = case.call, case.leaf("in.similarity")
    given = 1 if call.get("weights") is None else call["weights"]
    flat = similarity.flatten()
    weight = (case.inputs[given] if isinstance(given, str) else torch.tensor(given)).to(flat.dtype).flatten()
    clamp = None if call.get("clamp") is None else tuple(call["clamp"])
    loss = loss_of(flat, weight.expand_as(flat), clamp=clamp, margin=call.get("margin", 0))
    return {"out.loss": loss, **case.grads(loss)}


@adapter("clims/otm_loss")
def otm_loss(case: Case) -> dict[str, Tensor]:
    return matching(case, losses.object_text_matching_loss)


@adapter("clims/btm_loss")
def btm_loss(case: Case) -> dict[str, Tensor]:
    return matching(case, losses.background_text_matching_loss)


@adapter("clims/image_text_similarity")
def image_text_similarity(case: Case) -> dict[str, Tensor]:
    similarity = modules.image_text_similarity(case.leaf("in.image_features"), case.leaf("in.text_features"))
    values = {"out.similarity": similarity.reshape(-1, 1, 1)}
    return {**values, **case.grads(values)}


@adapter("clims/cbs_loss")
def cbs_loss(case: Case) -> dict[str, Tensor]:
    images, texts = case.leaf("in.image_features"), case.inputs["in.background_text_features"]
    similarity = modules.pairwise_cosine_similarity(images, texts, clamp=None)
    loss = losses.background_suppression_loss(similarity, threshold=case.call["threshold"])
    return {"out.loss": loss, **case.grads(loss)}


@adapter("clims/cbs_loss_class_related")
def cbs_loss_class_related(case: Case) -> dict[str, Tensor]:
    prefix = "in.background_text_features."
    tables = {int(key.removeprefix(prefix)): table for key, table in case.inputs.items() if key.startswith(prefix)}
    images = case.leaf("in.image_features")
    owner = torch.tensor([k for k, table in tables.items() for _ in table], dtype=torch.long)
    texts = torch.cat([images.new_zeros(0, images.shape[1]), *tables.values()])
    related = case.inputs["in.class_index"].reshape(-1, 1) == owner
    similarity = modules.pairwise_cosine_similarity(images, texts, clamp=None)
    loss = losses.class_background_suppression_loss(similarity, related)
    return {"out.loss": loss, **case.grads(loss)}


@adapter("clims/masked_images")
def masked_images(case: Case) -> dict[str, Tensor]:
    activation, images, labels = case.leaf("in.activation"), case.inputs["in.image"], case.inputs["in.label"]
    size = case.call["input_size"]
    pairs = modules.masked_image_pairs(activation, images, (labels == 1).float(), size=size)
    values = {"out.foreground": pairs.foreground, "out.background": pairs.background}
    return {**values, **case.grads(values)}


@adapter("clims/clims_objective")
def clims_objective(case: Case) -> dict[str, Tensor]:
    call, param = case.call, case.params
    weight, bias = param["param.image_encoder.weight"], param.get("param.image_encoder.bias")

    def encode(images: Tensor) -> Tensor:
        grid = round((weight.shape[1] / images.shape[1]) ** 0.5)
        return F.linear(F.adaptive_avg_pool2d(images, grid).flatten(1), weight, bias)

    names = ("object_weight", "background_weight", "suppression_weight", "area_weight")
    terms = losses.clims_loss(
        case.leaf("in.activation"),
        case.inputs["in.image"],
        (case.inputs["in.label"] == 1).float(),
        encode,
        case.inputs["in.class_text_features"],
        case.inputs["in.background_text_features"],
        size=call["input_size"],
        threshold=call["threshold"],
        **dict(zip(names, call["hyper"], strict=True)),
    )
    values = {"loss": terms.total, "otm": terms.object_text, "btm": terms.background_text}
    values |= {"cbs": terms.suppression, "area": terms.area}
    return {**{f"out.{name}": value for name, value in values.items()}, **case.grads(terms.total)}


@adapter("clims/balanced_cross_entropy")
def balanced_cross_entropy(case: Case) -> dict[str, Tensor]:
    logits, mask = case.leaf("in.logits"), case.inputs["in.label"]
    loss = losses.balanced_cross_entropy_loss(logits, mask.long(), ignore_index=case.call.get("ignore_index", 255))
    return {"out.loss": loss, **case.grads(loss)}
