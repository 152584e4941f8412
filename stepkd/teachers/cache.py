"""A teacher on disk: its k likeliest tokens at every position of given completions, and the mass of all others.

``manifest.json`` says what the numbers belong to (teacher, tokenizer, temperature, k), ``part-00000.parquet`` and so on
hold them, each with its checksum in ``part-00000.json``. They are written by :mod:`stepkd.teachers.cache_writer`.

A cache knows the completions it was written for, and nothing else: it cannot score what a student samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepkd.data.collate import MicroBatch
from stepkd.data.encode import Example, completion_key
from stepkd.errors import ConfigError, ModelError
from stepkd.losses import top_k_buckets
from stepkd.teachers.signals import Comparison, Signals

FORMAT, VERSION = "stepkd-teacher-cache", 1
MANIFEST_NAME = "manifest.json"

Key = bytes
Entry = tuple[Tensor, Tensor, Tensor]
"""Ids (T, k), log-probabilities (T, k) and the log-mass of all other tokens (T,) of a completion of T tokens."""


def tokenizer_hash(tokenizer: Any) -> str:
    """Short hash of a vocabulary: equal when the same ids are the same tokens."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CachedSignals:
    """A cache's view of the targets of a micro-batch."""

    ids_Nk: Tensor
    """int64 likeliest tokens, likeliest first."""
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

    def compare(self, log_student_CV: Tensor, *chunk: Tensor) -> Comparison:
        """See :class:`~stepkd.teachers.signals.Signals`."""
        ids_Ck, logps_Ck, tail_C = chunk
        teacher = torch.cat([logps_Ck, tail_C.unsqueeze(-1)], dim=-1)
        if not self.tail:
            teacher = logps_Ck - logps_Ck.logsumexp(-1, keepdim=True)
        student = top_k_buckets(log_student_CV, ids_Ck, tail=self.tail)
        return Comparison(student, teacher.to(student.dtype), ids_Ck[:, 0])


class CachedTeacher:
    """A teacher whose weights are not needed any more.

    Args:
        folder: a finished cache.
        top_k: use only so many of the tokens it holds; None: all.
        tail: see :class:`CachedSignals`.

    Raises:
        ModelError: no finished cache there, or a part that was changed or damaged.
    """

    def __init__(self, folder: str | Path, *, top_k: int | None = None, tail: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_json(self.folder / MANIFEST_NAME)
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != VERSION:
            raise ModelError(f"{self.folder} is not a teacher's cache of version {VERSION}: write one again")
        self.stored_k = int(self.manifest["top_k"])
        if top_k is not None and top_k > self.stored_k:
            raise ConfigError(f"divergence.top_k={top_k}, and the cache in {self.folder} holds {self.stored_k} tokens")
        self.top_k = top_k or self.stored_k
        self.tail = tail
        self._entries: dict[Key, Entry] = {}

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Read and check the cache (once); see :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ModelError: it was written with another tokenizer, is not finished, or a part is damaged.
        """
        if self._entries:
            return
        if (own := tokenizer_hash(tokenizer)) != self.manifest["tokenizer"]:
            raise ModelError(
                f"the cache in {self.folder} was written with another tokenizer ({self.manifest['tokenizer']} there, "
                f"{own} here): its ids are other tokens; write it again for this student"
            )
        if vocab_size not in (None, self.manifest["vocabulary"]):
            raise ModelError(
                f"the cache in {self.folder} was written with {self.manifest['vocabulary']} tokens, and the student "
                f"has logits for {vocab_size}: resize its embeddings to its tokenizer, or write the cache again"
            )
        for path in sorted(self.folder.glob("part-*.parquet")):
            self._read_part(path)
        if len(self._entries) != self.manifest["completions"]:
            raise ModelError(
                f"the cache in {self.folder} holds {len(self._entries)} of {self.manifest['completions']} completions: "
                "give `stepkd cache-teacher` the same command again to finish it"
            )

    def _read_part(self, path: Path) -> None:
        from pyarrow import parquet

        facts = read_json(path.with_suffix(".json"))
        if sha256_of(path) != facts.get("sha256"):
            raise ModelError(
                f"{path} is damaged or was changed (its checksum differs): delete it and its .json, and "
                "give `stepkd cache-teacher` the same command again"
            )
        table = parquet.read_table(path)
        columns = (table.column(name) for name in ("key", "ids", "logps", "tail"))
        for key, ids, logps, tail in zip(*columns, strict=True):
            rows = -1, self.stored_k
            self._entries[key.as_py()] = (
                torch.tensor(ids.values.to_numpy(), dtype=torch.int32).view(rows),
                torch.tensor(logps.values.to_numpy()).view(rows),
                torch.tensor(tail.values.to_numpy()),
            )

    def check_precision(self, precision: str) -> None:
        """Called when training begins, with the Trainer's precision.

        Raises:
            ConfigError: the cache was computed in another one.
        """
        own = self.manifest.get("precision", "32-true")
        if own != precision:
            raise ConfigError(
                f"the cache in {self.folder} was written with trainer.precision {own} and this run has {precision}: "
                "its numbers are not those of a teacher beside the student; write it again with this run's settings"
            )

    def identity(self) -> str:
        """Fingerprint of the teacher that wrote it, with k and temperature."""
        facts = {name: self.manifest[name] for name in ("teacher", "top_k", "temperature", "tokenizer", "data")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """The student's own: a cache is found by them."""
        return [example.prompt_ids for example in examples]

    def signals(self, batch: MicroBatch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: another temperature than the cache's, or a completion that it does not hold.
        """
        if temperature != self.manifest["temperature"]:
            raise ConfigError(
                f"divergence.temperature={temperature}, and the cache in {self.folder} was written at "
                f"{self.manifest['temperature']}: set it to that, or write the cache again"
            )
        found = [self._entry(example) for example in batch.examples if example.completion_ids]
        device = batch.targets_N.device
        if not found:
            empty = torch.zeros(0, self.top_k, device=device)
            return CachedSignals(empty.long(), empty, empty[:, 0], self.tail)
        ids, logps, tail = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
        if self.top_k < self.stored_k:
            tail = torch.logaddexp(tail, logps[:, self.top_k :].logsumexp(-1))
        return CachedSignals(ids[:, : self.top_k].long(), logps[:, : self.top_k], tail, self.tail)

    def _entry(self, example: Example) -> Entry:
        entry = self._entries.get(completion_key(example.prompt_ids, example.completion_ids))
        if entry is None:
            raise ConfigError(
                f"the cache in {self.folder} does not hold the completion of row {example.id!r} (of "
                f"{self.manifest['completions']} it does): the data, template or max_length is not what it was written "
                "for. Write it again with this recipe"
            )
        return entry


def part_name(number: int) -> str:
    """File name of a part, without its ending."""
    return f"part-{number:05d}"


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a cache.

    Raises:
        ModelError: it is missing, or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing: no teacher's cache there; write one with `stepkd cache-teacher`"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): write the cache again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object: write the cache again")
    return found
