"""What a head's weights say alone, without a forward. Imported by analyses only."""
