"""`python -m cluster` is `tenure`."""

from cluster.cli import main

main()
