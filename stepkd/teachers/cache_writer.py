"""Writing a teacher's cache: part by part, each whole or not at all; a killed job goes on after the last one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepkd.data.batching import micro_batches
from stepkd.data.collate import collate
from stepkd.data.encode import Example, completion_key
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.losses import chunked_head, tempered, top_k_buckets
from stepkd.runs.files import write_file, write_json
from stepkd.teachers.cache import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    Entry,
    Key,
    part_name,
    read_json,
    sha256_of,
    tokenizer_hash,
)
from stepkd.teachers.local import LocalTeacher, check_context
from stepkd.teachers.signals import HiddenSignals

PART_SIZE = 256
"""Completions per file: what a kill can lose."""


def write_cache(
    folder: str | Path,
    teacher: LocalTeacher,
    examples: Iterable[Example],
    *,
    top_k: int,
    temperature: float = 1.0,
    max_tokens: int = 8192,
    chunk_size: int = 1024,
    precision: str = "32-true",
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a cache, or go on with one that was interrupted.

    Args:
        folder: where it goes; begun, or gone on with.
        teacher: bound to the student's tokenizer.
        examples: completions with the student's prompt ids; equal ones are written once, empty ones not at all.
        top_k: tokens kept per position, >= 1 and less than all.
        temperature: divides the teacher's logits; training must use the same.
        max_tokens: most tokens read at once, padding included.
        chunk_size: positions whose logits exist at once.
        precision: the Trainer's in the runs that read it, ``32-true`` or ``bf16-mixed``; the teacher computes in it.
        report: called after every part with (completions done, completions in all).

    Returns:
        The manifest.

    Raises:
        ConfigError: ``top_k`` out of range, rows that are longer than the teacher's context, or the folder holds
            another cache (what differs is named).
        DataError: there is nothing to write.
    """
    folder = Path(folder).expanduser()
    vocabulary = teacher.policy.vocab_size
    if not 1 <= top_k < vocabulary:
        raise ConfigError(f"top_k={top_k}: must lie between 1 and {vocabulary - 1}, one less than the vocabulary")
    wanted = {completion_key(e.prompt_ids, e.completion_ids): e for e in examples if e.completion_ids}
    if not wanted:
        raise DataError("no row has a completion to score: a teacher's cache is written for given completions")
    check_context(teacher, list(wanted.values()))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "teacher": {"name": teacher.spec.path, "weights": teacher.identity()},
        "template": repr(teacher.spec.template),
        "tokenizer": tokenizer_hash(teacher.policy.tokenizer),
        "vocabulary": vocabulary,
        "top_k": top_k,
        "temperature": temperature,
        "precision": precision,
        "completions": len(wanted),
        "data": hashlib.sha256(b"".join(wanted)).hexdigest()[:32],
    }
    _begin(folder, manifest)
    items = list(wanted.items())
    for number, start in enumerate(range(0, len(items), PART_SIZE)):
        part = items[start : start + PART_SIZE]
        if not (folder / f"{part_name(number)}.json").is_file():
            examples = [example for _, example in part]
            with torch.autocast(
                teacher.policy.device.type, torch.bfloat16, precision == "bf16-mixed", cache_enabled=False
            ):
                entries = _score(teacher, examples, top_k, temperature, max_tokens, chunk_size)
            _write_part(folder, number, [key for key, _ in part], entries)
        if report is not None:
            report(start + len(part), len(items))
    return manifest


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST_NAME
    if path.is_file():
        earlier = {"precision": "32-true"} | read_json(path)
        if different := [name for name in manifest if earlier.get(name) != manifest[name]]:
            name = different[0]
            raise ConfigError(
                f"{folder} holds another cache ({name}: {earlier.get(name)!r} there, {manifest[name]!r} now): give "
                "another --out, or delete it"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no teacher's cache: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)


@torch.no_grad()
def _score(
    teacher: LocalTeacher, examples: list[Example], top_k: int, temperature: float, max_tokens: int, chunk_size: int
) -> list[Entry]:
    """Entries of the examples, in order."""
    found: dict[int, Entry] = {}

    def likeliest(logits_CV: Tensor) -> Tensor:
        log_CV = tempered(logits_CV, temperature)
        ids_Ck = log_CV.topk(top_k, dim=-1).indices
        buckets_CW = top_k_buckets(log_CV, ids_Ck)
        return torch.cat([ids_Ck.double(), buckets_CW.double()], dim=-1)

    for group in micro_batches([example.length for example in examples], max_tokens):
        batch = collate([examples[i] for i in group], int(teacher.policy.tokenizer.pad_token_id or 0))
        signals = teacher.signals(batch.to(teacher.policy.device), temperature=temperature)
        assert isinstance(signals, HiddenSignals)
        values = chunked_head(likeliest, signals.head, signals.hidden_NH, chunk_size=chunk_size).cpu()
        if not values[:, top_k].isfinite().all():
            raise ModelError(f"the teacher {teacher.spec.path} gave logits that are not finite")
        sizes = [len(examples[i].completion_ids) for i in group]
        for i, rows in zip(group, values.split(sizes), strict=True):
            found[i] = (rows[:, :top_k].long(), rows[:, top_k:-1].float(), rows[:, -1].float())
    return [found[i] for i in range(len(examples))]


def _write_part(folder: Path, number: int, keys: list[Key], entries: list[Entry]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "key": pyarrow.array(keys, pyarrow.binary(16)),
        "ids": pyarrow.array([ids.flatten().tolist() for ids, _, _ in entries], pyarrow.list_(pyarrow.int32())),
        "logps": pyarrow.array([logps.flatten().tolist() for _, logps, _ in entries], pyarrow.list_(pyarrow.float32())),
        "tail": pyarrow.array([tail.tolist() for _, _, tail in entries], pyarrow.list_(pyarrow.float32())),
    }
    path = folder / f"{part_name(number)}.parquet"
    write_file(path, lambda temporary: parquet.write_table(pyarrow.table(columns), temporary))
    write_json(folder / f"{part_name(number)}.json", {"sha256": sha256_of(path), "completions": len(keys)})
