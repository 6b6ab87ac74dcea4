"""Lenses for methods: the text that they are fitted on, the fit with its quality, and the lens that an option names."""
