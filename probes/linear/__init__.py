"""Linear probes and affine maps fitted to stored rows; imported by analyses only."""
