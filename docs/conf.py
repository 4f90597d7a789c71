"""How Sphinx builds this site: ``sphinx-build -W --keep-going -n docs docs/_build``."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_ext"), str(DOCS / "gallery")]

import torch  # noqa: E402

torch.set_num_threads(1)  # pictures come out the same on any number of cores

release = version = installed_version("wsss")
project = "wsss"
author = copyright = "The wsss authors"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "api_pages",
    "facts",
    "mathml",
    "repository_links",
]
exclude_patterns = ["_build", "gallery", "auto_gallery/*.ipynb", "auto_gallery/*.py", "sg_execution_times.rst"]

html_theme = "furo"
html_title = "wsss"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"top_of_page_buttons": []}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

default_role = "py:obj"  # a name in single backticks is a link where it can be one

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes", "Shape", "Paper", "Differences", "Range"]
napoleon_use_rtype = False
python_maximum_signature_line_length = 96

# Types of other packages, whose documentation is not read at build time, and the shorthands of the annotations.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|nn|F|collections|typing|pathlib)\..*"),
    ("py:class", r"Tensor|Size|Path|optional|callable"),
    ("py:class", r"Offset|tuple\[str"),
    ("py:mod", r"wsss_modules\.kernels\..*"),
    ("py:obj", r"(?!wsss_).*"),
]

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "abort_on_example_error": True,
    "ignore_pattern": r"scenes\.py",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "capture_repr": (),
    "within_subsection_order": "FileNameSortKey",
}
suppress_warnings = ["config.cache"]
