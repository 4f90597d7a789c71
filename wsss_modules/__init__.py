"""Modules for weakly supervised semantic segmentation: tensors in, tensors out."""
