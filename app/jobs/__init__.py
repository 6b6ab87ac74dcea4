"""Runs outside the dashboard's process: one worker owns the model and does one job after the other."""
