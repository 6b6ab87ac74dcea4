"""What every analysis returns: tables, figures, profiles, provenance, and the page they make. Below the methods: it knows no analysis."""
