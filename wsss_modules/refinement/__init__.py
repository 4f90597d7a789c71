"""Refinement of class maps by what the network or the image says about pairs of places."""

from wsss_modules.refinement.patch_affinity import refine_with_patch_affinity

__all__ = ["refine_with_patch_affinity"]
