"""Tasks learned one after the other."""
