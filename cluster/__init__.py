"""Where work runs: the command line, Ray sessions and the order of a run's stages."""
