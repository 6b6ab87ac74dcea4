"""What is checked on a real forward when a model is loaded, and which points are refused for it."""
