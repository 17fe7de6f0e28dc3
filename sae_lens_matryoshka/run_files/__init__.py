"""Run files: read, changed from the command line, checked, and turned into SAELens's config objects."""
