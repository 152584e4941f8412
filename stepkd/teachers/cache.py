"""A teacher on disk: its k most likely tokens at every position of given completions, and the mass of all others.

It is written by a job (:mod:`stepkd.runs.job`): ``settings.json`` says what the numbers belong to (teacher, tokenizer,
temperature, k), ``parts/completions/`` holds them, in safetensors files that carry a hash of their content and of the
settings.

A cache knows the completions it was written for, and nothing else: it cannot score what a student samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepkd.data.collate import Batch, collate, plan
from stepkd.data.completion import Completion
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.losses import chunked_head, tempered, top_k_buckets
from stepkd.runs.files import write_file
from stepkd.runs.job import ALONE, PARTS, Job, JobOptions, numbered, package_versions, read_settings
from stepkd.teachers.config import Cached
from stepkd.teachers.local import LocalTeacher, check_context
from stepkd.teachers.signals import Compared, HiddenSignals, Signals, Teacher

KIND = "teacher's cache"
COMPLETIONS = "completions"
"""The one phase of writing a cache."""
PART_SIZE = 256
"""Completions per file: what a kill can lose."""

COLUMNS = ("keys", "lengths", "ids", "logps", "tail")
"""Of a part: each completion's key (16 bytes) and number of tokens, and the entries, completion after completion."""

Key = bytes
Entry = tuple[Tensor, Tensor, Tensor]
"""Ids (T, k), log-probabilities (T, k) and the log-mass of all other tokens (T,) of a completion of T tokens."""


def _hash(facts: Any) -> str:
    """Short hash of JSON values; of a sorted vocabulary equal when the same ids are the same tokens."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CachedSignals:
    """A cache's view of the targets of a micro-batch."""

    ids_Nk: Tensor
    """int64 most likely tokens, most likely first."""
    logps_Nk: Tensor
    """Their log-probabilities."""
    tail_N: Tensor
    """Log-mass of all other tokens; -inf for none."""
    tail: bool = True
    """Whether the rest is a bucket of its own, or the k are renormalised."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :class:`~stepkd.teachers.signals.Signals`."""
        return (self.ids_Nk, self.logps_Nk, self.tail_N)

    def compare(self, log_student_CV: Tensor, *chunk: Tensor) -> Compared:
        """See :class:`~stepkd.teachers.signals.Signals`."""
        ids_Ck, logps_Ck, tail_C = chunk
        teacher = torch.cat([logps_Ck, tail_C.unsqueeze(-1)], dim=-1)
        if not self.tail:
            teacher = logps_Ck - logps_Ck.logsumexp(-1, keepdim=True)
        student = top_k_buckets(log_student_CV, ids_Ck, tail=self.tail)
        return Compared(student, teacher.to(student.dtype), ids_Ck[:, 0])


class CachedTeacher(Teacher):
    """A teacher whose weights are not needed any more: a finished cache.

    Raises:
        ModelError: no finished cache there, or a part that was changed or damaged.
    """

    def __init__(self, spec: Cached) -> None:
        self.folder = Path(spec.folder).expanduser()
        try:
            self.settings = read_settings(self.folder)
            if self.settings["kind"] != KIND:
                raise DataError(f"another kind of job ({self.settings['kind']})")
        except DataError as error:
            raise ModelError(
                f"no teacher's cache that this version reads in {self.folder} ({error}): write one with `stepkd "
                "cache-teacher`"
            ) from error
        self.stored_k = int(self.settings["top_k"])
        self.top_k, self.tail = (self.stored_k, True) if spec.top_k is None else (spec.top_k.k, spec.top_k.tail)
        if self.top_k > self.stored_k:
            raise ConfigError(
                f"teacher.top_k.k={self.top_k}, and the cache in {self.folder} holds {self.stored_k} tokens"
            )
        self._entries: dict[Key, Entry] = {}

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Read and check the cache (once); see :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: it was written with another tokenizer or vocabulary.
            ModelError: it is not finished, or a part is damaged.
        """
        if self._entries:
            return
        self._check("tokenizer", _hash(sorted(tokenizer.get_vocab().items())))
        if vocab_size is not None:
            self._check("vocabulary", vocab_size)
        for path in sorted((self.folder / PARTS / COMPLETIONS).glob("*.safetensors")):
            self._read_part(path)
        if len(self._entries) != self.settings["completions"]:
            raise ModelError(
                f"the cache in {self.folder} holds {len(self._entries)} of {self.settings['completions']} completions: "
                "give `stepkd cache-teacher` the same command again to finish it"
            )

    def _check(self, setting: str, own: Any) -> None:
        """Refuse a run for whose tokens, logits or precision the numbers were not written."""
        if own != self.settings[setting]:
            raise ConfigError(
                f"the cache in {self.folder} was written with {setting} {self.settings[setting]}, this run has {own}: "
                "change that, or write the cache again with this run's settings"
            )

    def _read_part(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in COLUMNS}
                damage = "" if file.metadata() == {"hash": _digest(tensors, self.settings)} else "its hash differs"
        except Exception as error:  # safetensors has its own class for what is not what was written
            damage = f"{type(error).__name__}: {error}"
        if damage:
            raise ModelError(
                f"{path} is damaged or was changed ({damage}): delete it, and give `stepkd cache-teacher` the same "
                "command again"
            )
        keys, lengths, *columns = tensors.values()
        parts = (column.split(lengths.tolist()) for column in columns)
        self._entries |= zip((bytes(key.tolist()) for key in keys), zip(*parts, strict=True), strict=True)

    def start(self, precision: str, template: PromptTemplate | None) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: the cache was computed in another one.
        """
        self._check("precision", precision)

    def identity(self) -> str:
        """Fingerprint of the teacher that wrote it, with its prompt template, k and temperature."""
        names = ("teacher", "top_k", "temperature", "tokenizer", "data")
        own = {} if self.settings["template"] == "None" else {"template": self.settings["template"]}
        return _hash({name: self.settings[name] for name in names} | own)

    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: another temperature than the cache's, or a completion that it does not hold.
        """
        self._check("temperature", temperature)
        asked = [example for example in batch.examples if len(example.token_ids)]
        if unknown := [example.id for example in asked if example.key not in self._entries]:
            raise ConfigError(
                f"the cache in {self.folder} does not hold the completion of row {unknown[0]!r} (of "
                f"{self.settings['completions']} it does): the data, template or max_length is not what it was written "
                "for. Write it again with this recipe"
            )
        none = torch.zeros(0, self.stored_k)
        found = [(none.int(), none, none[:, 0]), *(self._entries[example.key] for example in asked)]
        ids, logps, tail = (torch.cat(parts).to(batch.targets_N.device) for parts in zip(*found, strict=True))
        if self.top_k < self.stored_k:
            tail = torch.logaddexp(tail, logps[:, self.top_k :].logsumexp(-1))
        return CachedSignals(ids[:, : self.top_k].long(), logps[:, : self.top_k], tail, self.tail)


def write_cache(
    folder: str | Path,
    teacher: LocalTeacher,
    examples: Iterable[Completion],
    *,
    top_k: int,
    temperature: float = 1.0,
    max_tokens: int = 8192,
    chunk_size: int = 1024,
    precision: str = "32-true",
    options: JobOptions = ALONE,
) -> dict[str, Any]:
    """Write a cache, or resume.

    Args:
        folder: where it goes; begun, or resumed.
        teacher: bound to the student's tokenizer.
        examples: completions with the student's prompt ids; equal ones are written once, empty ones not at all.
        top_k: tokens kept per position, >= 1 and less than all.
        temperature: divides the teacher's logits; training must use the same.
        max_tokens: most tokens read at once, padding included.
        chunk_size: positions whose logits exist at once.
        precision: the Trainer's in the runs that read it, ``32-true`` or ``bf16-mixed``; the teacher computes in it.
        options: which rank this is, and whether to overwrite an earlier cache in the folder.

    Returns:
        The settings that ``settings.json`` holds; empty while other ranks have parts left to write.

    Raises:
        ConfigError: ``top_k`` out of range, rows that are longer than the teacher's context, or the folder holds
            another cache (what differs is named) or something else.
        DataError: there is nothing to write.
    """
    vocabulary = teacher.policy.vocab_size
    if not 1 <= top_k < vocabulary:
        raise ConfigError(f"top_k={top_k}: must lie between 1 and {vocabulary - 1}, one less than the vocabulary")
    wanted = {each.key: each for each in examples if len(each.token_ids)}
    if not wanted:
        raise DataError("no row has a completion to score: a teacher's cache is written for given completions")
    check_context(teacher, list(wanted.values()))
    job = Job(Path(folder).expanduser(), KIND, options=options)
    settings = job.begin(
        {
            "teacher": {"name": teacher.spec.path, "weights": teacher.identity()},
            "template": repr(teacher.spec.template),
            "tokenizer": _hash(sorted(teacher.policy.tokenizer.get_vocab().items())),
            "vocabulary": vocabulary,
            "top_k": top_k,
            "temperature": temperature,
            "precision": precision,
            "max_tokens": max_tokens,
            "chunk_size": chunk_size,
            "completions": len(wanted),
            "data": hashlib.sha256(b"".join(wanted)).hexdigest()[:32],
            "device": teacher.policy.device.type,
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
        }
    )

    def write(part: list[tuple[Key, Completion]], path: Path) -> None:
        with torch.autocast(teacher.policy.device.type, torch.bfloat16, precision == "bf16-mixed", cache_enabled=False):
            entries = _score(teacher, [example for _, example in part], top_k, temperature, max_tokens, chunk_size)
        _write_part(path, [key for key, _ in part], entries, settings)

    items = list(wanted.items())
    units = numbered([items[start : start + PART_SIZE] for start in range(0, len(items), PART_SIZE)])
    job.work_files(COMPLETIONS, units, write, ".safetensors")
    if job.missing(COMPLETIONS, units):
        return {}
    job.tidy()
    return settings


@torch.no_grad()
def _score(
    teacher: LocalTeacher, examples: list[Completion], top_k: int, temperature: float, max_tokens: int, chunk_size: int
) -> list[Entry]:
    """Entries of the examples, in order."""
    found: dict[Key, Entry] = {}

    def likeliest(logits_CV: Tensor) -> Tensor:
        log_CV = tempered(logits_CV, temperature)
        ids_Ck = log_CV.topk(top_k, dim=-1).indices
        buckets_CW = top_k_buckets(log_CV, ids_Ck)
        return torch.cat([ids_Ck.double(), buckets_CW.double()], dim=-1)

    for group in plan(examples, max_tokens):
        batch = collate(group, int(teacher.policy.tokenizer.pad_token_id or 0))
        signals = teacher.signals(batch.to(teacher.policy.device), temperature=temperature)
        assert isinstance(signals, HiddenSignals)
        values = chunked_head(likeliest, signals.head, signals.hidden_NH, chunk_size=chunk_size).cpu()
        if not values[:, top_k].isfinite().all():
            raise ModelError(f"the teacher {teacher.spec.path} gave logits that are not finite")
        sizes = [len(each.token_ids) for each in group]
        for each, rows in zip(group, values.split(sizes), strict=True):
            found[each.key] = (rows[:, :top_k].int(), rows[:, top_k:-1].float(), rows[:, -1].float())
    return [found[each.key] for each in examples]


def _digest(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Hash of a part's content and of the cache that it belongs to."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in COLUMNS:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _write_part(path: Path, keys: list[Key], entries: list[Entry], settings: Mapping[str, Any]) -> None:
    lengths = torch.tensor([len(tail) for _, _, tail in entries])
    columns = [torch.cat(column) for column in zip(*entries, strict=True)]
    key_bytes = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
    tensors = dict(zip(COLUMNS, (key_bytes, lengths, *columns), strict=True))
    facts = {"hash": _digest(tensors, settings)}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata=facts))
