"""What SAELens's runners need around them: checks before a run starts."""
