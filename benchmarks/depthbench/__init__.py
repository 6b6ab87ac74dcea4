"""Models trained with the location of their computation enforced, and how they are made."""
