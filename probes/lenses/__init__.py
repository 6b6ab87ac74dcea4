"""Reading a residual stream as a distribution over tokens. Imported by kernels and by analyses."""
