"""
From a CAM to a mask with a dense CRF
=====================================

A map at stride 4 becomes a mask at full size. The background score decides how much is object, the CRF where exactly it
ends.
"""

# %%
# Two scores of the background: a constant, and :math:`(1 - \max_k M_k)^\alpha`, which falls where any class is
# active. A larger exponent leaves less background.

import torch
from scenes import as_input, classifier, scene, show
from torch.nn import functional as F

from wsss_modules import PSA_CRF, background_score, cam_to_mask, dense_crf, normalize_cam, unary_from_scores

picture = scene(2010, classes=(5, 1))
present = sorted({index for index, _ in picture.objects})
image = torch.tensor(picture.image).permute(2, 0, 1)[None]
with torch.no_grad():
    maps = classifier()(as_input(picture)).cam[:, [index - 1 for index in present]]
cam = normalize_cam(F.interpolate(maps, image.shape[-2:], mode="bilinear"))
keys = torch.tensor(present)

show(
    ("photograph", picture.image),
    *((f"map of class {index}", one) for index, one in zip(present, cam[0], strict=True)),
    ("truth", torch.tensor(picture.mask).long()),
)

# %%
scores = {alpha: torch.cat([background_score(cam, alpha), cam], 1) for alpha in (2, 4, 16)}
show(
    ("constant 0.25", cam_to_mask(cam, 0.25, keys=keys)[0]),
    *((f"alpha {alpha}", torch.cat([torch.zeros(1).long(), keys])[s.argmax(1)][0]) for alpha, s in scores.items()),
)

# %%
# The same scores as energies of a fully connected CRF: pixels of like colour that are near each other want the same
# label. The kernels depend on the image only; ten steps of mean field.

refined = {alpha: dense_crf(image, unary_from_scores(s), PSA_CRF).argmax(1) for alpha, s in scores.items()}
show(
    *((f"alpha {a}, with the CRF", torch.cat([torch.zeros(1).long(), keys])[m][0]) for a, m in refined.items()),
    ("truth", torch.tensor(picture.mask).long()),
)
