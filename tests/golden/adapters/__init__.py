"""One module per system, found by listing this folder: a new system is a new file.

An adapter converts layouts (released names, axis orders, 0-based class keys) and calls the public API; it holds no
formula and reads sizes and hyper-parameters from the case, never from the file's name.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
