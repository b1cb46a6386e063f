"""Timing the catalog, and the demonstration that runs everything once."""
