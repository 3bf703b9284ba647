"""Processes and devices: how a run is spread, and the global batch that its losses see."""
