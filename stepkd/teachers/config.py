"""Teachers as settings: a class for each kind, with only its own, and what each kind cannot do."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, check_bounds
from stepkd.models.spec import DType, Quantization
from stepkd.sampling.config import checked_urls

Needs = dict[str, str]
"""What a run needs of a teacher, each with the setting that asks for it: that it scores text it has not seen
(``fresh``), gives its whole distribution (``whole``) or the targets' log-probabilities alone (``targets``), at any
temperature (``tempered``), can be sampled from (``writes``), is another model than the student (``other``)."""


@dataclass(frozen=True)
class TopK:
    """A comparison of a teacher's most likely tokens in place of the whole vocabulary."""

    k: int
    """Most likely tokens of the teacher that are compared at every position, >= 1."""
    tail: bool = True
    """Whether all other tokens are one more bucket, which bounds the whole divergence from below; off, the k are
    renormalised, and what the student thinks of other tokens goes unseen."""

    def __post_init__(self) -> None:
        check_bounds("top_k.", self, k="[1, inf)")


class TeacherConfig(ABC):
    """The model that is distilled from: :class:`Local`, :class:`Cached`, :class:`Served`, several of these
    (:class:`Routed`), or the student itself as a :class:`SelfSnapshot`, :class:`SelfAverage` or :class:`SelfBase`."""

    top_k: TopK | None
    lacks: ClassVar[Mapping[str, str]] = {}
    """What this kind of teacher cannot do, and what to do about it; completes "... and this teacher"."""

    teacher: ClassVar[tuple[str, str]]
    """File of this folder and class that is made of these settings."""

    def build(self) -> Any:
        """Make the teacher, a :class:`~stepkd.teachers.signals.Teacher`; nothing is loaded before it is bound.

        Raises:
            ModelError: a cache that is not there.
        """
        file, name = self.teacher
        return getattr(import_module(f"stepkd.teachers.{file}"), name)(self)

    def require(self, needs: Needs) -> None:
        """Refuse a run that asks for more than this kind of teacher can do.

        Args:
            needs: what a part of the run's settings asks for.

        Raises:
            ConfigError: names the setting, what the teacher lacks, and what to do.
        """
        for need, setting in needs.items():
            lack = self.lacks.get(need)
            if need in ("whole", "targets") and self.top_k is not None and "whole" not in self.lacks:
                lack = "is compared in its most likely tokens alone: set teacher.top_k to null"
            if lack is not None:
                raise ConfigError(f"{setting}, and the teacher {type(self).__name__} {lack}")


@dataclass(frozen=True)
class Local(TeacherConfig):
    """Another model of the student's vocabulary, in this process."""

    path: str
    """Run folder, checkpoint, model folder, hub id, ``.gguf`` file or tiny preset of the teacher."""
    dtype: DType | None = None
    """Numeric type of its weights; null keeps the one they are stored in."""
    quantization: Quantization = "none"
    """Whether its weights are kept in 4 or 8 bits (``nf4``, ``int8``; bitsandbytes, CUDA only)."""
    device: str | None = None
    """Device that it lives on (``cuda:1``, ``cpu``); null: the student's."""
    sharded: bool = False
    """Shard it over the ranks like the student, under ``recipes/strategy/fsdp2.yaml``; off, all of it on every rank."""
    attention: str | None = None
    """Attention implementation (``sdpa``, ``eager``, ``flash_attention_2``); null lets transformers choose."""
    template: str | Path | PromptTemplate | None = None
    """Prompt template that it reads the student's completions under, where that is another than the data's; null: the
    student's own prompt ids."""
    top_k: TopK | None = None
    """Compare only its most likely tokens; null: the whole vocabulary, which is exact."""

    def __post_init__(self) -> None:
        check_bounds("teacher.", self)
        if not self.path:
            raise ConfigError("teacher.path is empty: give a folder, a hub id, a .gguf file or a tiny preset")
        if self.sharded and (self.device is not None or self.quantization != "none"):
            raise ConfigError(
                f"teacher.sharded with device={self.device}, quantization={self.quantization}: shards are unquantised "
                "weights on the ranks' own devices; set teacher.device to null and teacher.quantization to none"
            )

    teacher: ClassVar[tuple[str, str]] = ("local", "LocalTeacher")


@dataclass(frozen=True)
class Cached(TeacherConfig):
    """A teacher's most likely tokens for the data's completions, as ``stepkd cache-teacher`` wrote them."""

    folder: str
    """Folder of the cache."""
    top_k: TopK | None = None
    """Use only so many of the tokens that the cache holds; null: all of them, and a bucket for the others."""

    lacks: ClassVar[Mapping[str, str]] = {
        "fresh": "knows only the completions that it was written for: train on given ones (source: {lmbda: 0, teacher: "
        "0}, fidelity: null), or take the teacher Local",
        "whole": "holds no whole distribution: take the teacher Local",
        "writes": "writes nothing: take the teacher Local",
    }

    teacher: ClassVar[tuple[str, str]] = ("cache", "CachedTeacher")


@dataclass(frozen=True)
class Served(TeacherConfig):
    """A teacher on vLLM servers, which score the student's text."""

    urls: tuple[str, ...] | str
    """Addresses, ``http://host:port``, one or several of the same model, asked in turn. A key is read from the
    environment variable VLLM_API_KEY."""
    tokenizer: str | None = None
    """Folder or hub id of its tokenizer; null: the model that the server names."""
    top_k: TopK | None = None
    """How many of its most likely tokens it is asked for; null: 64, which hold nearly all of the mass. KDRL's SampledKL
    and AsAdvantage read the sampled token's log-probability alone, and ask for no more than that."""
    template: str | Path | PromptTemplate | None = None
    """Prompt template that it reads the student's completions under, where that is another than the data's; null: the
    student's own prompt ids."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", checked_urls("teacher.urls", self.urls))
        object.__setattr__(self, "top_k", self.top_k or TopK(64))

    lacks: ClassVar[Mapping[str, str]] = {
        "whole": "gives its most likely tokens only: take the teacher Local",
        "tempered": "cannot temper, as vLLM ignores temperatures in the scores of given text: set the temperature to 1",
        "writes": "is not sampled from here: sample it beforehand (stepkd label), or take the teacher Local",
    }

    teacher: ClassVar[tuple[str, str]] = ("server", "ServerTeacher")


@dataclass(frozen=True)
class _Self(TeacherConfig):
    top_k: TopK | None = field(default=None, kw_only=True)
    """Compare only its most likely tokens; null: the whole vocabulary, which is exact."""

    lacks: ClassVar[Mapping[str, str]] = {
        "writes": "is the student itself: set source.lmbda in place of source.teacher, and fidelity.answers to false",
        "other": "is the student itself: take the teacher Local",
    }


@dataclass(frozen=True)
class SelfSnapshot(_Self):
    """The student as it was a while ago (PS-KD, arXiv 2006.12000): when the pass over the data began."""

    every: int | None = None
    """Renew it after so many optimiser steps, >= 1; null: after every pass over the data, as the paper does."""

    def __post_init__(self) -> None:
        check_bounds("teacher.", self, every="[1, inf)")

    teacher: ClassVar[tuple[str, str]] = ("own", "SnapshotTeacher")


@dataclass(frozen=True)
class SelfAverage(_Self):
    """A running average of the student's weights (the mean teacher, arXiv 1703.01780)."""

    decay: float = 0.999
    """Weight of the average against the student at every optimiser step, in (0, 1)."""

    def __post_init__(self) -> None:
        check_bounds("teacher.", self, decay="(0, 1)")

    teacher: ClassVar[tuple[str, str]] = ("own", "AverageTeacher")


@dataclass(frozen=True)
class SelfBase(_Self):
    """The student as it was before training: its adapter-off view where fresh adapters are trained, else a copy."""

    teacher: ClassVar[tuple[str, str]] = ("own", "BaseTeacher")


@dataclass(frozen=True)
class Routed(TeacherConfig):
    """Several teachers, of which a column of the data names the one that each row is distilled from."""

    teachers: dict[str, TeacherConfig]
    """Value of the column -> the teacher of its rows (Local, Cached or Served, each with its own settings)."""
    column: str = "teacher"
    """Column of the rows that names the teacher."""

    top_k = None
    lacks: ClassVar[Mapping[str, str]] = {
        "writes": "is several, which are not sampled from here: sample them beforehand (stepkd label)",
    }

    teacher: ClassVar[tuple[str, str]] = ("routed", "RoutedTeacher")

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ConfigError("teacher.teachers is empty: give each value of the column a teacher")
        for name, each in self.teachers.items():
            if not isinstance(each, Local | Cached | Served):
                raise ConfigError(
                    f"teacher.teachers.{name} is {type(each).__name__}: rows are routed to the teachers Local, Cached "
                    "and Served"
                )

    def require(self, needs: Needs) -> None:
        """Refuse what one of them cannot do; see :meth:`TeacherConfig.require`."""
        super().require(needs)
        for each in self.teachers.values():
            each.require(needs)
