"""
Tokens of a transformer to a map
================================

A transformer hands out tokens, not maps: prefix tokens first, then the patches row by row. Here a token is simply the
mean colour of its patch, so that one sees at once whether they were laid out right.
"""

# %%
# Patches of 8 pixels of a wide image, and one class token before them.

import torch
from scenes import scene, show
from torch.nn import functional as F

from wsss_modules import map_to_tokens, patch_grid, refine_with_patch_affinity, tokens_to_map

picture = scene(1002)
photograph = picture.image[16:112]  # 96 x 128
image = torch.tensor(photograph).permute(2, 0, 1)[None] / 255
grid = patch_grid(image.shape, 8)
tokens = torch.cat([torch.zeros(1, 1, 3), map_to_tokens(F.avg_pool2d(image, 8))], 1)
print("tokens", tuple(tokens.shape), "grid", grid)

right = tokens_to_map(tokens, grid, num_prefix=1)
turned = tokens_to_map(tokens, grid[::-1], num_prefix=1)  # width and height exchanged: also 192 patches
show(
    ("photograph", photograph),
    (f"grid {grid}", right[0].permute(1, 2, 0)),
    (f"grid {grid[::-1]}: wrong", turned[0].permute(1, 2, 0)),
    columns=3,
)

# %%
# A wrong count can't pass: the message says what would fit.

try:
    tokens_to_map(tokens, grid)
except ValueError as error:
    print(error)

# %%
# Attention among patches is an affinity for nothing. Here it comes from the colours; a map that has only part of the
# object gathers from the patches that look alike.

flat = map_to_tokens(right)
attention = (-30 * torch.cdist(flat, flat)).softmax(-1)  # rows are queries
truth = torch.tensor(picture.mask[16:112] == picture.objects[0][0]).float()[None, None]
part = F.avg_pool2d(truth, 8)
part[..., grid[1] // 2 :] = 0  # the left half only
show(
    ("part of the object", part[0, 0]),
    ("after one refinement", refine_with_patch_affinity(part, attention)[0, 0]),
    ("truth, in patches", F.avg_pool2d(truth, 8)[0, 0]),
    columns=3,
)
