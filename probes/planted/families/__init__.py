"""The families of planted models, one file each: `build(id, seed)` returns a task without its certificate."""
