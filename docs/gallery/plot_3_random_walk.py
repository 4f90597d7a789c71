"""
A random walk that a boundary stops
===================================

IRN's walk on a drawn boundary: what spreads, what is stopped, and what a gap does. The affinities are half a stencil of
offsets; the matrix of all pairs is never made.
"""

# %%
# A ring of boundary, and one with a gap of three cells. The seed is a small spot inside.

import torch
from scenes import show

from wsss_modules import EdgeToAffinity, propagate_to_edge, random_walk

size = 48
y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
distance = ((y - 24.0) ** 2 + (x - 24.0) ** 2).sqrt()
ring = ((distance - 16).abs() < 1).float()[None, None]
gap = ring.clone()
gap[..., 23:26, 30:] = 0
seed = ((distance - 6).abs() < 2.5).float()[None, None] * (x > 24)

show(("seed", seed[0, 0]), ("closed boundary", ring[0, 0]), ("boundary with a gap", gap[0, 0]), columns=3)

# %%
# Steps add up: after 16 the seed has spread a little, after 256 it fills the ring. Through the gap it leaks.

closed = {n: propagate_to_edge(seed, ring, radius=5, beta=10, n_steps=n)[0, 0] for n in (0, 16, 64, 256)}
leaking = {n: propagate_to_edge(seed, gap, radius=5, beta=10, n_steps=n)[0, 0] for n in (0, 16, 64, 256)}
show(
    *((f"closed, {n} steps", walked) for n, walked in closed.items()),
    *((f"gap, {n} steps", walked) for n, walked in leaking.items()),
)

# %%
# A weak boundary holds back too: affinities are raised to the power beta, so that 0.3 of a boundary holds most of it
# back at 10.

panels = []
for beta in (1, 4, 10):
    walked = propagate_to_edge(seed, 0.3 * ring, radius=5, beta=beta, n_steps=256)
    panels.append((f"boundary 0.3, beta {beta}", walked[0, 0]))
show(*panels, columns=3)

# %%
# All 256 steps, or the first Chebyshev polynomials of the same operator, a third of the products:

affinity = EdgeToAffinity(radius=5)(0.3 * ring)
power = random_walk(seed, affinity, beta=10, n_steps=256)
chebyshev = random_walk(seed, affinity, beta=10, n_steps=256, method="chebyshev")
print(f"largest difference {float((power - chebyshev).abs().max()):.1e}")
