"""Tournaments of strategies under a retention contract: what they came to, and how it is shown."""
