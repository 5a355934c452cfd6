"""Looks at what runs have recorded; it only reads."""
