"""What every analysis returns: tables, figures, profiles, provenance, and the page they make. Knows no analysis."""
