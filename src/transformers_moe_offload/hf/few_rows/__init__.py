"""Modules beside the experts on a CPU, whose few rows of a decode step go through the compiled kernels."""
