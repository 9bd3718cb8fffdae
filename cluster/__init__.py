"""Where work runs: the command line, Ray sessions, jobs on clusters and the order of a run's stages."""

from cluster.jobs import submit

__all__ = ["submit"]
