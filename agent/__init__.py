"""The edge runtime agent: how authentic models run on this board."""

__version__ = "0.1.0"
