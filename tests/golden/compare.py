"""Reads the tolerance text of a golden file and compares a value with the stored one.

A text is a list of clauses parted by ``;`` or by a comma and a space; brackets hold further clauses. A clause is a
subject (which output it is about; none = all) and a rule:

    rtol=1e-5,atol=1e-6            close
    exact                          equal
    exact to 2 grey levels         8-bit images within 2 (also "allow +-1"), flags and indices equal
    >=99.9% of pixels equal        that share of the elements equal; also "0.2% of pixels may differ"
    masks IoU>=.99                 boolean masks along the first axis, each overlapping that much

What is said in other words is for the adapter, which then returns `Within`, `Agreement` or `Overlap`, not a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class GoldenError(AssertionError):
    """A golden file disagrees with the library, or can't be run."""


@dataclass(frozen=True)
class Within:
    """A value with the tolerance that the words of the file's metadata ask for."""

    value: Tensor
    rtol: float = 0.0
    atol: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """A label map of which at least the share ``at_least`` of the elements must be equal to the stored ones."""

    value: Tensor
    at_least: float


@dataclass(frozen=True)
class Overlap:
    """Boolean masks (n, H, W), each with at least this intersection over union with the stored one."""

    value: Tensor
    at_least: float


Value = Tensor | Within | Agreement | Overlap


@dataclass(frozen=True)
class Rule:
    """One clause: the kind of comparison and the words that say which outputs it is about (none = all)."""

    kind: str  # "close", "grey", "agreement", "overlap" or "words"
    subjects: tuple[frozenset[str], ...]
    rtol: float = 0.0
    atol: float = 0.0
    at_least: float = 1.0

    def apply(self, value: Tensor) -> Value:
        if self.kind == "agreement":
            return Agreement(value, self.at_least)
        if self.kind == "overlap":
            return Overlap(value, self.at_least)
        return Within(value, self.rtol, self.atol)


NUMBER = r"(\d*\.?\d+(?:e[+-]?\d+)?)"
CLOSE = re.compile(rf"(?:rtol={NUMBER})?,?(?:atol={NUMBER})?$")
EXACT = re.compile(rf"\bexact(?: values| to {NUMBER} grey levels?)?$")
FILLER = {"equal", "on", "of", "and", "the", "later", "allow"}


def parse_tolerance(text: str) -> tuple[Rule, ...]:
    """Parse a tolerance text into rules, in the order of the text."""
    rules: list[Rule] = []
    for clause in _clauses(text):
        rule = _parse_clause(clause)
        # "exact (uint8), allow +-1 on rounding ties": the second half loosens the first
        if (
            (slack := re.match(rf"allow \+-{NUMBER}", clause))
            and rules
            and rules[-1] == Rule("close", rules[-1].subjects)
        ):
            rule = Rule("grey", rules.pop().subjects, atol=float(slack[1]))
        if rule is not None:
            rules.append(rule)
    return tuple(rules)


def _clauses(text: str) -> Iterator[str]:
    inner = re.findall(r"\(([^()]*)\)", text)
    outer = re.sub(r"\([^()]*\)", "", text)
    for part in (outer, *inner):
        for clause in re.split(r";|,\s", part):
            if clause.strip():
                yield clause.strip()


def _parse_clause(clause: str) -> Rule | None:
    if found := re.search(r"(?:rtol|atol)=\S+", clause):
        numbers = CLOSE.match(found[0])
        if numbers is None:
            return None
        rtol, atol = (float(n) if n else 0.0 for n in numbers.groups())
        return Rule("close", _subjects(clause[: found.start()]), rtol=rtol, atol=atol)
    if found := EXACT.search(clause):
        subjects = _subjects(clause[: found.start()])
        return Rule("grey", subjects, atol=float(found[1])) if found[1] else Rule("close", subjects)
    if found := re.search(rf"IoU\s*>=\s*{NUMBER}", clause):
        return Rule("overlap", _subjects(clause[: found.start()]), at_least=float(found[1]))
    if found := re.search(rf">=\s*{NUMBER}\s*%", clause):
        return Rule("agreement", _subjects(clause[: found.start()]), at_least=float(found[1]) / 100)
    if found := re.search(rf"(?:<=\s*)?{NUMBER}\s*%.*\bdiffer\b", clause):
        return Rule("agreement", _subjects(clause[: found.start()]), at_least=1 - float(found[1]) / 100)
    first = clause.split(":")[0].split(" ")[0]
    return Rule("words", _subjects(first))


def _subjects(text: str) -> tuple[frozenset[str], ...]:
    """The outputs that a clause names: "centroids and map equal on" -> ({centroid}, {map})."""
    named = []
    for part in re.split(r"\band\b|:", text):
        words = _words(part) - FILLER
        if words:
            named.append(frozenset(words))
    return tuple(named)


def _words(name: str) -> set[str]:
    words = re.findall(r"[a-z]+|[0-9]+", name.lower())
    plural = {"losses": "loss", "boxes": "box"}
    return {plural.get(w, w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w) for w in words}


def choose_rule(rules: tuple[Rule, ...], key: str, stored: Tensor) -> Rule:
    """The rule for a stored value: the one that names it best, else the one for all, else the only one of its kind."""
    named = [
        (max(len(s) for s in r.subjects if s <= _words(key)), r)
        for r in rules
        if any(s <= _words(key) for s in r.subjects)
    ]
    if named:
        rule = max(named, key=lambda pair: pair[0])[1]
        if rule.kind == "words":
            raise GoldenError(f"{key}: its tolerance is given in words, so the adapter must return Within or Agreement")
        return _suited(key, rule, stored)
    general = [r for r in rules if not r.subjects and r.kind != "words"]
    if len(general) == 1:
        return _suited(key, general[0], stored)
    kind = "close" if stored.is_floating_point() else "overlap" if stored.dtype == torch.bool else "agreement"
    candidates = [r for r in rules if r.kind == kind and r != Rule("close", r.subjects)]
    if len(candidates) == 1:
        return candidates[0]
    if not stored.is_floating_point() and not candidates:
        return Rule("close", ())  # classes, counts, indices: equal
    raise GoldenError(f"{key}: no clause of the tolerance names it, so the adapter must return Within or Agreement")


def _suited(key: str, rule: Rule, stored: Tensor) -> Rule:
    """Grey levels are for 8-bit images; flags and indices in the same file are exact."""
    if rule.kind != "grey":
        return rule
    if stored.is_floating_point():
        raise GoldenError(f"{key}: grey levels don't apply to {stored.dtype}, so the adapter must return Within")
    image = stored.dtype == torch.uint8 and stored.numel() > 0 and int(stored.max()) > 1
    return rule if image else Rule("close", ())


def compare(key: str, value: Value, stored: Tensor) -> str | None:
    """Return a line that says how ``value`` misses ``stored``, or None if it does not."""
    if isinstance(value, Tensor):
        raise TypeError("compare: expected a Within, Agreement or Overlap; choose_rule(...).apply(tensor) makes one")
    ours, stored = value.value.detach().cpu(), stored.cpu()
    if tuple(ours.shape) != tuple(stored.shape):
        return f"{key}: expected shape {tuple(stored.shape)}, got {tuple(ours.shape)}"
    known = torch.ones_like(stored, dtype=torch.bool)
    if stored.is_floating_point():
        known = stored.isfinite()
        if not bool(ours[~known].isfinite().all()):
            return f"{key}: the stored value is NaN or infinite there, ours must be finite and is not"
    ours, stored = ours.double()[known], stored.double()[known]
    if isinstance(value, Overlap):
        return _compare_overlap(key, value, ours.reshape(value.value.shape), stored.reshape(value.value.shape))
    if isinstance(value, Agreement):
        share = (ours == stored).double().mean().item() if stored.numel() else 1.0
        if share < value.at_least:
            return f"{key}: {100 * share:.3f}% of the elements agree, expected at least {100 * value.at_least:g}%"
        return None
    error = (ours - stored).abs()
    limit = value.atol + value.rtol * stored.abs()
    bad = ~(error <= limit)  # written so that a NaN of ours is bad
    if bool(bad.any()):
        worst = int((error - limit).nan_to_num(nan=float("inf")).argmax())
        return (
            f"{key}: {int(bad.sum())} of {bad.numel()} values beyond rtol={value.rtol:g}, atol={value.atol:g}; "
            f"worst: expected {stored[worst].item():.9g}, got {ours[worst].item():.9g}"
        )
    return None


def _compare_overlap(key: str, value: Overlap, ours: Tensor, stored: Tensor) -> str | None:
    ours, stored = ours.flatten(1) > 0, stored.flatten(1) > 0
    union = (ours | stored).sum(1)
    iou = torch.where(union > 0, (ours & stored).sum(1) / union.clamp(min=1), 1.0)
    if bool((iou < value.at_least).any()):
        return (
            f"{key}: mask {int(iou.argmin())} overlaps by {iou.min().item():.4f}, expected at least {value.at_least:g}"
        )
    return None
