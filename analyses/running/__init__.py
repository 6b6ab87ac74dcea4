"""From a model, prompts and an analysis to a saved result, for every front end alike."""
