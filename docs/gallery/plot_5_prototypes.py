"""
Prototypes of one image
=======================

SIPE compares each cell of an image with the mean features of its own classes, found by overlap, and so gets a map with
a background of its own and no threshold.
"""

# %%
# The features are those of the small classifier, joined with the colours; the maps are its CAMs.

import torch
from scenes import as_input, classifier, scene, show
from torch.nn import functional as F

from wsss_modules import explore_prototypes

picture = scene(2010, classes=(5, 1))
present = sorted({index for index, _ in picture.objects})
labels = torch.zeros(1, 6)
labels[0, [index - 1 for index in present]] = 1
body, head = classifier()
inputs = as_input(picture)
with torch.no_grad():
    features = body(inputs)
    maps = head(features).cam
colours = F.adaptive_avg_pool2d(inputs, features.shape[-2:])
joined = torch.cat([F.normalize(features, dim=1), F.normalize(colours, dim=1)], 1)

found = explore_prototypes(maps, joined, labels)
channels = [0, *present]
names = ["background", *(f"class {index}" for index in present)]
show(
    ("photograph", picture.image),
    *((f"CAM of {name}", found.scores[0, c]) for name, c in zip(names, channels, strict=True)),
)

# %%
# A cell becomes a seed of the class whose map best overlaps with what looks like it (SIPE's structure-aware seeds),
# and the cosine with the mean feature of the seeds is the new map.

show(
    ("seeds", found.seeds[0].argmax(0)),
    *((f"IS-CAM of {name}", found.is_cam[0, c]) for name, c in zip(names, channels, strict=True)),
)

# %%
# The strongest channel is the mask, background included.

mask = (found.is_cam * torch.cat([torch.ones(1, 1), labels], 1)[..., None, None]).argmax(1)
show(("mask of the IS-CAMs", mask[0]), ("truth", torch.tensor(picture.mask).long()), columns=2)
