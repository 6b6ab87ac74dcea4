"""Linear probes and affine maps fitted to stored rows. Imported by analyses only."""
