"""Data: sources of images and labels, their transforms, and loaders that yield `Batch`."""

from deit_kd.data.loader import Batch, EvaluationLoader, LoaderConfig, TrainLoader
from deit_kd.data.sources.base import Source
from deit_kd.data.sources.catalog import SOURCES, open_source

__all__ = ["SOURCES", "Batch", "EvaluationLoader", "LoaderConfig", "Source", "TrainLoader", "open_source"]
