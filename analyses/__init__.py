"""The published methods, the registry, results and the command line."""
