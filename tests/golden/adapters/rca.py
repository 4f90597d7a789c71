"""RCA: 0-based classes, saliency in 0..255, one case over several epochs of attention maps."""

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


@adapter("rca/regional_contrast_mixup")
def regional_contrast_mixup(case: Case) -> dict[str, Tensor]:
    inputs, call = case.inputs, case.call
    pairs = torch.stack([inputs["in.region_image"], inputs["in.region_class"]], 1)
    assert torch.equal(pairs, inputs["in.label"].nonzero()), "the draws are in the order of the present pairs"
    loss = losses.regional_contrast_loss(
        case.leaf("in.embedding"),
        inputs["in.map_coarse"],
        inputs["in.label"],
        inputs["in.memory"],
        mix=modules.RegionMixUp(inputs["in.mix_image"], inputs["in.mix_class"], inputs["in.mix_lambda"]),
        temperature=call["temperature"],
        log_floor=call["log_floor"],
    )
    return {"out.loss": loss, **case.grads(loss)}


@adapter("rca/memory_update")
def memory_update(case: Case) -> dict[str, Tensor]:
    inputs, call = case.inputs, case.call
    memory = inputs["in.memory"]
    bank = modules.RegionMemoryBank(
        len(memory),
        call["queue_len"],
        memory.shape[2],
        momentum=call["momentum"],
        threshold=call["prob_threshold"],
        legacy_init=True,
        legacy_intersection=True,
    ).to(memory.dtype)
    bank.load_state_dict({"slots": memory, "pointer": inputs["in.pointer"], "filled": bank.filled})
    bank.update(inputs["in.feature"], inputs["in.map_coarse"], inputs["in.label"], inputs["in.prob"])
    return {"out.memory": bank.slots, "out.pointer": bank.pointer}


@adapter("rca/semantic_aggregation")
def semantic_aggregation(case: Case) -> dict[str, Tensor]:
    prototypes = case.inputs["in.prototypes"]
    layer = modules.SemanticAggregation(prototypes.shape[2], prototypes.shape[1], scale=case.call["scale"])
    outputs = {"y": case.load(layer, layer.released_key)(case.leaf("in.x"), prototypes)}
    return {"out.y": outputs["y"], **case.grads(outputs)}


@adapter("rca/online_attention_accumulation")
def online_attention_accumulation(case: Case) -> dict[str, Tensor]:
    inputs, call = case.inputs, case.call
    labels = inputs["in.label"]
    epochs = sorted(int(key.removeprefix("in.map_epoch")) for key in inputs if key.startswith("in.map_epoch"))
    size = tuple(inputs[f"in.map_epoch{epochs[0]}"].shape[2:])
    accumulator = modules.OnlineAttentionAccumulator(labels, size, threshold=call["prob_threshold"], eps=call["eps"])
    images = torch.arange(len(labels))
    for epoch in epochs:
        maps, probability = inputs[f"in.map_epoch{epoch}"], inputs[f"in.prob_epoch{epoch}"]
        accumulator.update(images, maps, probability, last=epoch == call["training_epoch"] - 1)
    return {
        "out.accumulated": accumulator.maps[accumulator.written],
        "out.index": labels.nonzero()[accumulator.written],
    }


@adapter("rca/pseudo_label_fusion")
def pseudo_label_fusion(case: Case) -> dict[str, Tensor]:
    inputs, call = case.inputs, case.call
    return {
        "out.label": modules.fuse_saliency_labels(
            inputs["in.crf_scores"][None],
            inputs["in.saliency"][None, None] / 255,
            keys=inputs["in.keys"] + 1,
            conflict=call["conflict"],
            attention=call["att_thr"],
            salient=call["bg_thr"] / 255,
            min_foreground=call["min_foreground"],
        )[0]
    }
