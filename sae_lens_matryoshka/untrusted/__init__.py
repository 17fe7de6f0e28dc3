"""Text and files of somebody else's: bounded when they are read, and plain text when they are shown."""
