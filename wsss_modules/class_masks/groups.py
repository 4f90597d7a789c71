"""Which images form a group, and which classes it is asked for (EDAM).

Axes: M images of a data set, P pairs, G groups of n images, K foreground classes, S of them sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsss_modules._checks import check_integer, check_ndim

__all__ = ["SharedClassPairs", "draw_shared_class_pairs", "sample_class_keys"]


class SharedClassPairs(NamedTuple):
    """What `draw_shared_class_pairs` returns: P pairs of images.

    Attributes:
        first: (P,) int64 index of an image.
        second: (P,) int64 index of its partner; the image itself if no other one shares a class with it.
        keys: (P,) int64 class 1..K that both have; 0 for an image without any.
    """

    first: Tensor
    second: Tensor
    keys: Tensor


@torch.no_grad()
def draw_shared_class_pairs(
    labels: Tensor, first: Tensor | None = None, *, generator: torch.Generator | None = None
) -> SharedClassPairs:
    """Draw a partner that shares a class for each image.

    One of the image's classes is drawn, all that another image has being equally likely, then one of the other images
    that have it. So a pair shares a rare class as often as a frequent one.

    Args:
        labels: (M, K) multi-hot labels of all images.
        first: (P,) int64 images to draw partners for; default: every image once, in order.
        generator: On the device of ``labels``.

    Returns:
        `SharedClassPairs`. What uses a pair takes its indices as they are, so that drawn ones can be kept and given
        again.

    Raises:
        TypeError: ``first`` does not hold integers.
        ValueError: a wrong shape.

    Paper:
        Wu et al., CVPR 2021.

    Differences:
        The released code reads pairs from a list that was drawn beforehand, whose rule is not told.

    Notes:
        A sort of the (M, K) labels and no loop over images. No host synchronisation.

    Example:
        >>> labels = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]])
        >>> draw_shared_class_pairs(labels)
        SharedClassPairs(first=tensor([0, 1, 2, 3]), second=tensor([1, 0, 2, 3]), keys=tensor([1, 1, 2, 0]))
    """
    check_ndim("labels", labels, 2, "(M, K)")
    present = labels > 0
    if first is None:
        first = torch.arange(len(labels), device=labels.device)
    check_ndim("first", first, 1, "(P,)")
    check_integer("first", first)
    if labels.numel() == 0 or len(first) == 0:
        return SharedClassPairs(first, first, torch.zeros_like(first))
    counts = present.sum(0)
    members = (~present).byte().argsort(dim=0, stable=True)  # (M, K): the images of each class first
    own = present[first]  # (P, K)
    dice = torch.rand((2, *own.shape), generator=generator, device=labels.device)
    shared = own & (counts > 1)
    key = torch.where(shared, dice[0], -1.0).argmax(1)  # (P,)
    others, rank = counts[key] - 1, present.cumsum(0)[first, key] - 1
    place = (dice[1, :, 0] * others).long().clamp(max=(others - 1).clamp(min=0))
    place = place + (place >= rank)  # the image itself is left out
    partner = members[place.clamp(max=len(labels) - 1), key]
    found = shared.any(1)
    alone = torch.where(own.any(1), own.byte().argmax(1) + 1, 0)
    return SharedClassPairs(first, torch.where(found, partner, first), torch.where(found, key + 1, alone))


@torch.no_grad()
def sample_class_keys(labels: Tensor, count: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """Classes to train on for each group of images: those that any of them has, then others in random order.

    Args:
        labels: (G, n, K) multi-hot labels of G groups of n images.
        count: S, at most K; default: all K, as published. Present classes beyond it are cut off, the highest first.
        generator: On the device of ``labels``.

    Returns:
        keys (G, S) int64, classes 1..K, each at most once in a row: present ones in ascending order, then absent ones,
        which are the negatives.

    Raises:
        ValueError: a wrong shape, or a ``count`` outside 1..K.

    Paper:
        Wu et al., CVPR 2021.

    Notes:
        With S = 6 of 20 classes a step costs 6/20 of the attention. No host synchronisation.

    Example:
        >>> labels = torch.tensor([[[0, 1, 0, 0], [0, 1, 0, 1]]])
        >>> sample_class_keys(labels, 2)
        tensor([[2, 4]])
        >>> sorted(sample_class_keys(labels)[0].tolist())
        [1, 2, 3, 4]
    """
    check_ndim("labels", labels, 3, "(G, n, K)")
    classes = labels.shape[2]
    count = classes if count is None else count
    if not 1 <= count <= classes:
        raise ValueError(f"count: expected 1..{classes}, got {count}")
    present = (labels > 0).any(1)  # (G, K)
    dice = torch.rand(present.shape, generator=generator, device=labels.device)
    order = torch.where(present, torch.arange(classes, device=labels.device) / classes - 1, dice)
    return order.argsort(1)[:, :count] + 1
