"""Kernels of our own in C++, for the CPU: each beside the Python that calls it, torch the fallback."""
