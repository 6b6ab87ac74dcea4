"""Prompts made by rule: tasks with known answers."""
