"""SAEs and their levels in a language model: hooks by the names of TransformerLens, and one level at a time."""
