"""A trained segmentation network as a folder that travels: ``model.safetensors`` and ``config.json``, no pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from recipes.pipeline.attention import AttendingTrunk
from recipes.pipeline.files import replacing
from recipes.pipeline.segmenter import (
    CosineSegmenter,
    SegFormer,
    SegFormerConfig,
    SegFormerHead,
    SegmentConfig,
    Segmenter,
)
from recipes.pipeline.transformers import TokenConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1
KINDS = {"segmenter": Segmenter, "cosine": CosineSegmenter, "segformer": SegFormer}


@dataclass(frozen=True)
class Pretrained:
    """A network with what is needed to use it.

    Attributes:
        network: images (B, 3, H, W), normalised by its ``mean`` and ``std``, to logits (B, 1 + K, h, w).
        config: how it was made and is tested.
        classes: names of the K foreground classes.
        palette_index: (1 + K,), the index of each class in masks that are written.
    """

    network: Segmenter | SegFormer
    config: SegmentConfig | SegFormerConfig
    classes: tuple[str, ...]
    palette_index: tuple[int, ...]


def save_pretrained(
    folder: Path,
    network: Segmenter | SegFormer,
    config: SegmentConfig | SegFormerConfig,
    classes: Sequence[str],
    palette_index: Sequence[int],
    **notes: object,
) -> None:
    """Write the network to ``folder``; ``notes``, such as the recipe, are kept in its configuration."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.net.state_dict().items()}
    with replacing(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(state))
    told = {
        "format": FORMAT,
        "kind": next(name for name, kind in KINDS.items() if type(network) is kind),
        "network": {key: value for key, value in asdict(config).items() if key != "schedule"},
        "shape": network.shape,
        "classes": list(classes),
        "palette_index": list(map(int, palette_index)),
        **notes,
    }
    with replacing(folder / CONFIG, "w") as file:  # last: a folder with it is complete
        json.dump(told, file, indent=1)


def from_pretrained(folder: Path) -> Pretrained:
    """Read what :func:`save_pretrained` wrote; the network is in eval mode.

    Raises:
        FileNotFoundError: ``folder`` has no such network.
        ValueError: files that are damaged or of another version.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: expected {CONFIG} and {WEIGHTS} of a trained segmentation network, {' and '.join(missing)} "
            "missing; a run has them once its stage segment is finished"
        )
    try:
        told = json.loads((folder / CONFIG).read_text())
        if told.get("format", FORMAT) != FORMAT:
            raise KeyError(f"format {told['format']}, this version reads {FORMAT}")
        classes, palette = tuple(told["classes"]), tuple(told["palette_index"])
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in told["network"].items()}
        network, config = _untrained(told.get("kind", "segmenter"), options, told.get("shape", {}), 1 + len(classes))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: not the configuration of a network of this version ({error})") from error
    _load(network.net, folder / WEIGHTS)
    return Pretrained(network.eval(), config, classes, palette)


def _untrained(
    kind: str, options: dict[str, Any], shape: dict[str, Any], num_classes: int
) -> tuple[Segmenter | SegFormer, SegmentConfig | SegFormerConfig]:
    """The network of a kind as it is made, with random weights."""
    random = {"weights": "random", "frozen_stages": 0}
    if KINDS[kind] is SegFormer:
        config = SegFormerConfig(**{**options, "tokens": TokenConfig(**{**options["tokens"], **random})})
        trunk = AttendingTrunk(config.tokens)
        return SegFormer(trunk, SegFormerHead(trunk.level_channels, config.dim, num_classes)), config
    settings = SegmentConfig(**{**options, **random})
    return KINDS[kind](settings, num_classes, **shape), settings


def _load(network: nn.Module, file: Path) -> None:
    try:
        state = safetensors.torch.load_file(file)
        network.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{file}: not the weights of this network ({first}); was it copied whole?") from error
