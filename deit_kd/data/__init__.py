"""Data: sources of images and labels, their transforms, and loaders that yield `Batch`."""

from deit_kd.data.loader import Batch, EvaluationLoader, Placement, TrainLoader
from deit_kd.data.sources.catalog import SOURCES, Source, open_source

__all__ = ["SOURCES", "Batch", "EvaluationLoader", "Placement", "Source", "TrainLoader", "open_source"]
