"""
From a photograph to a mask, step by step
=========================================

The pictures of the page *The words in pictures*: what each step makes of one drawn scene. The classifier is small and
was trained for seconds on the tags of such scenes; the boundary is drawn, where IRN would learn it.
"""

# %%
# **Seed.** The map of the scene's class, divided by its maximum, and what exceeds a constant.

import torch
from scenes import CLASSES, as_input, classifier, scene, show
from torch.nn import functional as F

from wsss_modules import (
    IRN_CRF,
    EdgeToAffinity,
    cam_to_mask,
    confident_label_from_cam,
    dense_crf,
    normalize_cam,
    propagate_to_edge,
    unary_from_mask,
    walk_scores,
)

STRIDE = 4
picture = scene(1012)
index = picture.objects[0][0]  # 1..K
image = torch.tensor(picture.image).permute(2, 0, 1)[None]  # (1, 3, H, W)
with torch.no_grad():
    coarse = normalize_cam(classifier()(as_input(picture)).cam[:, index - 1 : index])  # (1, 1, h, w)
cam = F.interpolate(coarse, image.shape[-2:], mode="bilinear")
seed = cam_to_mask(cam, 0.4) * index

show(
    ("photograph", picture.image),
    (f"class activation map: {CLASSES[index - 1]}", cam[0, 0]),
    ("seed: map above 0.4", seed[0]),
    ("truth", torch.tensor(picture.mask).long()),
)

# %%
# **Confident areas.** A strict threshold for the object, a loose one for the background, unsure (grey) between.

label = confident_label_from_cam(cam, fg=0.6, bg=0.2)
shown = torch.where(label == 1, index, label)
show(("confident areas", shown[0]), ("photograph", picture.image), columns=2)

# %%
# **Affinity.** One minus the strongest boundary on the line between two cells, for all pairs less than 5 cells apart.
# On the right, that of one cell with its neighbours.

inside = F.avg_pool2d(torch.tensor(picture.mask == index).float()[None, None], STRIDE)
body = (inside > 0.5).float()
edge = 0.98 * (F.max_pool2d(body, 3, 1, 1) - body)  # the outline, one cell wide
affinity = EdgeToAffinity(radius=5)(edge)
row = int(body[0, 0].sum(1).argmax())  # where the object is widest
column = int(body[0, 0, row].argmax()) + 1  # near its left border
spot = torch.zeros_like(edge)
spot[0, 0, row, column] = 1
show(
    ("boundary at stride 4", edge[0, 0]),
    ("affinity of one cell", affinity.matvec(spot)[0, 0]),
    columns=2,
)

# %%
# **Walk.** Each step replaces a cell by the average of those it is alike with, weighted by the tenth power of the
# affinity.

small = F.interpolate(cam, edge.shape[-2:], mode="area")
walks = {steps: propagate_to_edge(small, edge, radius=5, beta=10, n_steps=steps) for steps in (0, 4, 32, 256)}
show(*((f"{steps} steps", walked[0, 0]) for steps, walked in walks.items()))

# %%
# **Mask.** A constant for the background beside the walked map, then a dense CRF.

mask = cam_to_mask(walk_scores(walks[256], image.shape[-2:], stride=STRIDE), 0.4)
refined = dense_crf(image, unary_from_mask(mask, num_labels=2), IRN_CRF).argmax(1)
show(
    ("mask after the walk", mask[0] * index),
    ("after a dense CRF", refined[0] * index),
    ("truth", torch.tensor(picture.mask).long()),
    columns=3,
)
