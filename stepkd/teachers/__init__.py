"""Teachers: models that say what they would have written at every position of a student's text."""

from stepkd.teachers.local import LocalTeacher, TeacherSpec
from stepkd.teachers.signals import HiddenSignals, Signals, Teacher

__all__ = ["HiddenSignals", "LocalTeacher", "Signals", "Teacher", "TeacherSpec"]
