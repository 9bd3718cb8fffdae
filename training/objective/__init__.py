"""What is learned: the losses, and the signals of frozen models they need."""
