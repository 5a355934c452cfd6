"""The version, in one place; free of imports."""

__version__ = "0.1.0"
