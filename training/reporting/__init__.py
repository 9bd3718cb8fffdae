"""What a run shows its user: the report on screen and as a page."""
