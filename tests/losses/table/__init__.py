"""Every public loss, with inputs for each situation and the laws it obeys, by family.

A loss that is in none of the families fails `test_common.py`.
"""

from tests.losses.table import boxes, features, maps, pairs, tags, texts
from tests.losses.table.case import SITUATIONS, TOLERANCE, LossCase, total

__all__ = ["CASES", "SITUATIONS", "TOLERANCE", "LossCase", "total"]

CASES = (*pairs.CASES, *tags.CASES, *maps.CASES, *features.CASES, *texts.CASES, *boxes.CASES)
