"""IRNet: inter-pixel relations."""
