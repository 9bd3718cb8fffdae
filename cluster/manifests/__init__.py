"""Files that start a run on a cluster that is not there yet: Kubernetes with KubeRay, Slurm, Ray's cluster launcher."""
