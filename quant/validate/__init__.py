"""Who can load a quantised folder? `python -m quant validate DIR`."""
