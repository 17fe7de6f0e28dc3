"""The training and inference classes of the Matryoshka architectures, one file an idea."""
