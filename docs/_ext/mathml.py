"""Equations as MathML, which browsers draw without a script or a font from elsewhere."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)
_KNOWN_AS = {r"\langle": "⟨", r"\rangle": "⟩", r"\arg": r"\operatorname{arg}"}  # what the converter lacks


def _mathml(node: nodes.Element, display: str) -> str:
    source = node.astext()
    plain = source
    for command, known in _KNOWN_AS.items():
        plain = plain.replace(command, known)
    try:
        equation = convert(plain, display=display)
    except Exception as error:  # the converter has no base class of its own
        _LOGGER.warning("math that can't be converted, %s: %s", type(error).__name__, source, location=node)
        return ""
    if unknown := re.search(r"\\[a-zA-Z]+|<mi>&(amp;)?</mi>", equation):
        _LOGGER.warning("math with %s, which the converter does not know: %s", unknown[0], source, location=node)
    return equation


def visit_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """An equation in a line of text."""
    translator.body.append(f'<span class="math">{_mathml(node, "inline")}</span>')
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.Element) -> None:
    r"""Equations that stand alone: as in Sphinx, a blank line begins another and lines that end in ``\\`` align."""
    for part in re.split(r"\n\s*\n", node.astext()):
        if part.strip():
            source = rf"\begin{{align*}}{part}\end{{align*}}" if r"\\" in part and r"\begin" not in part else part
            equation = _mathml(nodes.math_block(source, source), "block")
            translator.body.append(f'<div class="math">{equation}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Take over the drawing of mathematics in HTML."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
