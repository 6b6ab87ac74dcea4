"""Forward hooks and attention taps: how tensors of a running module are read and replaced. Imported by models and blocks."""
