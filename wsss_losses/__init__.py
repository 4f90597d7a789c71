"""Losses for weakly supervised semantic segmentation, one file per paper."""
