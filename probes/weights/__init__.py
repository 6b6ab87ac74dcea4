"""What attention heads' weights say alone, without a forward; imported by analyses only."""
