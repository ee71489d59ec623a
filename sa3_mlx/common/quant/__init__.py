"""Quantization: the packed format, methods, recipes, calibration, the writer."""
