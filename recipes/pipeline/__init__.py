"""The stages that recipes share, as plain functions."""
