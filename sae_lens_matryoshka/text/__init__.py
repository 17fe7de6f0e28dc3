"""Text and tokens on this machine, to train and to evaluate on: every value that is read is looked at."""
