"""The loop, its state on disk, and the run folder."""
