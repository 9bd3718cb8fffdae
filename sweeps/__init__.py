"""Tournaments of strategies under a retention contract. Nothing here yet: single runs come first."""
