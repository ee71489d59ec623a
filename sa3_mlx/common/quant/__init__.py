"""Define the packed format, the methods, recipes and calibration of quantization, and the writer of folders."""
