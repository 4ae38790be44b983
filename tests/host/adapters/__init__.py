"""Random adapter files of every kind, with the float64 change of every weight that they mean."""

from .files import ADAPTERS, AdapterFile, Include, write_adapter

__all__ = ["ADAPTERS", "AdapterFile", "Include", "write_adapter"]
