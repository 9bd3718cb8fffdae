"""What was gained and forgotten: suites, scores, statistics and the contract."""
