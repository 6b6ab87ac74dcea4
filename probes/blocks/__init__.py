"""Running a model's blocks one by one, from any depth and in any order. Imported by edits, capture and everything above."""
