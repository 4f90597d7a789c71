"""Published systems as scripts, one file each; `python -m recipes` runs them."""
