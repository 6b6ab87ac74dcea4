"""Live work: what a page asks the resident model process while somebody waits, and what it answers."""
