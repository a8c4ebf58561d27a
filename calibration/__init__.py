"""Offline quantization: calibration data, statistics, GPTQ, and the walk through a model layer by layer."""
