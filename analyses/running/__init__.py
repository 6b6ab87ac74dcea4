"""From a model, prompts and an analysis to a saved result, for every front end alike; above the methods, below `studies` and `cli`."""
