"""Kernels are left out of the search for tests where triton is not installed."""

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["wsss_modules/kernels/*_*.py", "wsss_modules/kernels/launch.py"]
