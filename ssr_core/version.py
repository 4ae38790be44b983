"""The version of the pack; pyproject.toml reads it from here."""

VERSION = "0.1.0"
