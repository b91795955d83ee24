"""Speed, grading, attack: one command per table."""
