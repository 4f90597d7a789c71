"""Slow, obvious forms of the dense CRF, the peer library, and images to try them on."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from wsss_modules.dense_crf import CRFParameters

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "voc12_animals" / "JPEGImages"


def lattice_filter(features: Tensor, values: Tensor, normalize: bool) -> Tensor:
    """Adams et al. 2010 point by point: (N, d) features, (N, C) values -> (N, C), with a dict for the hash table.

    Follows section 3.1 literally: the nearest remainder-0 point by rounding, corrected by rank to lie on the plane.
    """
    d = features.shape[1]
    corners = []
    for feature in features.double().numpy():
        scaled = [f * np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i, f in enumerate(feature)]
        elevated = np.array([sum(scaled[i:]) - (i * scaled[i - 1] if i else 0.0) for i in range(d + 1)])
        nearest = (d + 1) * np.round(elevated / (d + 1))
        excess = round(nearest.sum() / (d + 1))
        order = np.argsort(nearest - elevated, kind="stable")  # largest difference first
        if excess > 0:
            nearest[order[d + 1 - excess :]] -= d + 1
        elif excess < 0:
            nearest[order[:-excess]] += d + 1
        difference = elevated - nearest
        order = np.argsort(-difference, kind="stable")
        sorted_difference = difference[order] / (d + 1)
        weights = [1 + sorted_difference[-1] - sorted_difference[0]]
        weights += [a - b for a, b in pairwise(sorted_difference)][::-1]
        for k, weight in enumerate(weights):
            vertex = nearest + k
            vertex[order[d + 1 - k :]] -= d + 1
            corners.append((tuple(vertex.astype(int)), weight))

    def apply(rows: np.ndarray) -> np.ndarray:
        table: dict[tuple[int, ...], np.ndarray] = {}
        for i, (vertex, weight) in enumerate(corners):
            table[vertex] = table.get(vertex, 0) + weight * rows[i // (d + 1)]
        for axis in range(d + 1):
            step = np.ones(d + 1, dtype=int)
            step[axis] -= d + 1
            zero = np.zeros(rows.shape[1])
            table = {
                key: value + 0.5 * (table.get(tuple(key + step), zero) + table.get(tuple(key - step), zero))
                for key, value in table.items()
            }
        out = np.zeros_like(rows)
        for i, (vertex, weight) in enumerate(corners):
            out[i // (d + 1)] += weight * table[vertex]
        return out

    rows = values.double().numpy()
    scale = (apply(np.ones((len(rows), 1))) + 1e-20) ** -0.5 if normalize else 1.0
    return torch.from_numpy(scale * apply(scale * rows))


def gaussian_kernel(features: Tensor) -> Tensor:
    """exp(-|f_i - f_j|^2 / 2), symmetrically normalised: (N, d) -> (N, N)."""
    kernel = torch.exp(-0.5 * (features[:, None] - features[None]).square().sum(-1))
    scale = (kernel.sum(1) + 1e-20).rsqrt()
    return scale[:, None] * kernel * scale


def exact_mean_field(image: Tensor, unary: Tensor, parameters: CRFParameters) -> Tensor:
    """Mean field with dense N x N kernels: (3, H, W) image, (C, H, W) energies -> (C, H, W), in float64."""
    height, width = image.shape[1:]
    y, x = np.mgrid[:height, :width]
    xy = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1).astype(np.float64))
    rgb = rearrange(image.double(), "c h w -> (h w) c")
    near = gaussian_kernel(xy / parameters.gaussian_sxy)
    alike = gaussian_kernel(torch.cat([xy / parameters.bilateral_sxy, rgb / parameters.bilateral_srgb], 1))
    energy = rearrange(unary.double(), "c h w -> (h w) c")
    q = (-energy).softmax(1)
    for _ in range(parameters.iterations):
        message = parameters.gaussian_weight * (near @ q) + parameters.bilateral_weight * (alike @ q)
        q = (message - energy).softmax(1)
    return rearrange(q, "(h w) c -> c h w", h=height)


def peer_crf(image: Tensor, unary: Tensor, parameters: CRFParameters) -> Tensor:
    """The same through pydensecrf2: (3, H, W) uint8 image, (C, H, W) float32 energies -> (C, H, W)."""
    from pydensecrf.densecrf import DenseCRF2D

    labels, height, width = unary.shape
    crf = DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1).numpy()))
    crf.addPairwiseGaussian(sxy=parameters.gaussian_sxy, compat=parameters.gaussian_weight)
    crf.addPairwiseBilateral(
        sxy=parameters.bilateral_sxy,
        srgb=parameters.bilateral_srgb,
        rgbim=np.ascontiguousarray(rearrange(image, "c h w -> h w c").numpy()),
        compat=parameters.bilateral_weight,
    )
    return torch.from_numpy(np.array(crf.inference(parameters.iterations))).view(labels, height, width)


def smooth_noise(channels: int, height: int, width: int, cells: int, generator: torch.Generator) -> Tensor:
    """(channels, H, W) in about [0, 1], varying over 1/cells of the height."""
    coarse = torch.rand(1, channels, cells, cells * width // height + 1, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def procedural_image(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, H, W) uint8 with shading, objects with sharp edges, texture and noise."""
    generator = torch.Generator().manual_seed(seed)
    image = 60 + 80 * smooth_noise(3, height, width, 3, generator)
    regions = smooth_noise(4, height, width, 5, generator).argmax(0)
    image += torch.tensor([0.0, 40.0, 70.0, -50.0])[regions] * torch.tensor([1.0, 0.6, -0.4]).view(3, 1, 1)
    image += 25 * (smooth_noise(1, height, width, min(height, 60), generator) - 0.5)
    image += 6 * torch.randn(3, height, width, generator=generator)
    return image.clamp(0, 255).to(torch.uint8)


def photograph(height: int, width: int, index: int = 0) -> Tensor | None:
    """(3, H, W) uint8 photograph resized to the size, or None where the photographs are not at hand."""
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))
    if not files:
        return None
    from PIL import Image

    with Image.open(files[index % len(files)]) as file:
        pixels = np.array(file.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


def smooth_scores(labels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(labels, H, W) scores in [0, 1] like those of CAMs: coarse, overlapping, not of sum 1."""
    return smooth_noise(labels, height, width, 6, torch.Generator().manual_seed(seed))
