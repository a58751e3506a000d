"""Triton kernels, imported as `pcoherence.kernels` and only by the backend that uses them."""
