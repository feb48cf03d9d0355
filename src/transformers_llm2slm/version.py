"""The version of this library: what it is built as, and what it writes into every configuration."""

__version__ = "0.1.0"
