"""What is in a data set: read, counted and compared before anything is learned from it."""
