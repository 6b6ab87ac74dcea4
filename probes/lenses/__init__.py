"""Ways to read a residual stream as a distribution over tokens, behind one `Lens`; imported by kernels and by analyses."""
