"""Students, teachers, projectors, and the distiller that holds everything trainable behind one forward."""

import timm  # noqa: F401  # first: importing it registers our students, which need the modules below unspoilt

from deit_kd.models import cifar_nets  # noqa: F401  # registers its networks with timm
from deit_kd.models.cached_teacher import CachedTeacher
from deit_kd.models.distiller import Distiller, StudentOutput
from deit_kd.models.loading import load_student
from deit_kd.models.projectors.vectors import build_projector
from deit_kd.models.students import build_student
from deit_kd.models.teacher import AnyTeacher, Teacher, TeacherOutput, load_teacher

__all__ = [
    "AnyTeacher",
    "CachedTeacher",
    "Distiller",
    "StudentOutput",
    "Teacher",
    "TeacherOutput",
    "build_projector",
    "build_student",
    "load_student",
    "load_teacher",
]
