"""Teachers: models that say what they would have written at every position of a student's text."""

from stepkd.teachers.cache import CachedTeacher, write_cache
from stepkd.teachers.local import LocalTeacher, TeacherSpec
from stepkd.teachers.own import SelfTeacher
from stepkd.teachers.server import ServerTeacher
from stepkd.teachers.signals import HiddenSignals, Signals, Teacher

__all__ = [
    "CachedTeacher",
    "HiddenSignals",
    "LocalTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "Signals",
    "Teacher",
    "TeacherSpec",
    "write_cache",
]
