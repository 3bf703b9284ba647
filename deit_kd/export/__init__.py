"""From a trained student to a folder that other people can use: weights, config, card."""

from deit_kd.export.card import write_card
from deit_kd.export.convert import convert
from deit_kd.export.student import export_student

__all__ = ["convert", "export_student", "write_card"]
