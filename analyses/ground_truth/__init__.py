"""How far off each method is on models whose answer is known, and what it claims where there is nothing; above the methods."""
