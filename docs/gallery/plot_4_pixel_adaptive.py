"""
Pixel-adaptive refinement
=========================

AFA refines maps while it trains, so that a dense CRF would be too slow: each pixel is replaced by a mean over
neighbours at several dilations, weighted by likeness of colour. The weights depend on the image alone and serve all
iterations.
"""

# %%
import torch
from scenes import as_input, classifier, scene, show
from torch.nn import functional as F

from wsss_modules import cam_to_mask, normalize_cam, pixel_adaptive_refinement

picture = scene(1014)
index = picture.objects[0][0]
image = torch.tensor(picture.image).permute(2, 0, 1)[None] / 255  # (1, 3, H, W) in [0, 1]
with torch.no_grad():
    coarse = normalize_cam(classifier()(as_input(picture)).cam[:, index - 1 : index])
cam = F.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=True)

refined = {n: normalize_cam(pixel_adaptive_refinement(image, cam, num_iter=n)) for n in (1, 3, 10)}
show(("map", cam[0, 0]), *((f"{n} iterations", one[0, 0]) for n, one in refined.items()))

# %%
# At the same threshold, borders have moved to where colours change. It repairs borders, not what the map never had.

show(
    ("photograph", picture.image),
    ("mask of the map", cam_to_mask(cam, 0.4)[0] * index),
    ("after 10 iterations", cam_to_mask(refined[10], 0.4)[0] * index),
    ("truth", torch.tensor(picture.mask).long()),
)

# %%
# Few or many dilations: how far a pixel looks at once.

show(
    *(
        (f"dilations {dilations}", normalize_cam(pixel_adaptive_refinement(image, cam, dilations=dilations))[0, 0])
        for dilations in ((1,), (1, 2, 4), (1, 2, 4, 8, 12, 24))
    ),
    columns=3,
)
