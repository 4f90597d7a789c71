"""A trained segmentation network as a folder that travels: ``model.safetensors`` and ``config.json``, no pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from recipes.pipeline.files import replacing
from recipes.pipeline.segmenter import SegmentConfig, Segmenter

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Pretrained:
    """A network with what is needed to use it.

    Attributes:
        network: images (B, 3, H, W), normalised by its ``mean`` and ``std``, to logits (B, 1 + K, h, w).
        config: how it was made and is tested.
        classes: names of the K foreground classes.
        palette_index: (1 + K,), the index of each class in masks that are written.
    """

    network: Segmenter
    config: SegmentConfig
    classes: tuple[str, ...]
    palette_index: tuple[int, ...]


def save_pretrained(
    folder: Path,
    network: Segmenter,
    config: SegmentConfig,
    classes: Sequence[str],
    palette_index: Sequence[int],
    **notes: object,
) -> None:
    """Write the network to ``folder``; ``notes``, such as the recipe, are kept in its configuration."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.net.state_dict().items()}
    with replacing(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(state))
    told = {
        "format": 1,
        "network": {key: value for key, value in asdict(config).items() if key != "schedule"},
        "shape": {"depth": network.depth, "decoder_channels": network.decoder_channels},
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
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in told["network"].items()}
        config = SegmentConfig(**{**options, "weights": "random", "frozen_stages": 0})
        classes, palette = tuple(told["classes"]), tuple(told["palette_index"])
        network = Segmenter(config, 1 + len(classes), **told.get("shape", {}))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: not the configuration of a network of this version ({error})") from error
    _load(network.net, folder / WEIGHTS)
    return Pretrained(network.eval(), config, classes, palette)


def _load(network: nn.Module, file: Path) -> None:
    try:
        state = safetensors.torch.load_file(file)
        network.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{file}: not the weights of this network ({first}); was it copied whole?") from error
