"""The version's only home: the build reads this file without importing the package, whose import needs torch."""

__version__ = "0.1.0"
