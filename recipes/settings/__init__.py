"""Settings of the recipes, one file each: what can be set, with its defaults, and the presets with their reasons.

A recipe imports them, so that its own script holds the method alone. Each field is a flag of the command line. What all
recipes have in common is in :mod:`recipes.settings.shared`.
"""
