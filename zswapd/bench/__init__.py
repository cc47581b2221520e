"""Measuring zswapd against the kernel's own swap devices, on memory of real programs."""
