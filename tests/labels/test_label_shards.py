"""Shards: the union of all files, whose groups are whose, and the wait for others."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import DataError, StepkdError
from stepkd.labels.shards import Shards, work_through

GROUPS = [[0, 1], [2, 3], [4, 5], [6]]


def work(items: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": f"i{item}", "index": item, "square": item * item} for item in items]


def do(folder: Path, rank: int, world_size: int) -> Shards:
    shards = Shards(folder, "squares", rank=rank)
    work_through(shards, GROUPS, work, rank=rank, world_size=world_size)
    return shards


def test_union_of_any_ranks(tmp_path: Path) -> None:
    first = do(tmp_path, 0, 3)
    assert first.finished() == {0, 3}
    done: list[int] = []
    second = Shards(tmp_path, "squares", rank=1)
    work_through(
        second, GROUPS, work, rank=1, world_size=2, report=lambda rows: done.extend(row["index"] for row in rows)
    )
    assert done == [2, 3], "group 3 was finished by another rank of another launch"
    do(tmp_path, 0, 1)
    assert [row["square"] for row in first.wait(4, 1, timeout_s=0)] == [i * i for i in range(7)]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["squares-0.jsonl", "squares-1.jsonl"]


def test_an_item_in_two_files_counts_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        with Shards(tmp_path, "squares", rank=rank).writer() as store:
            store.append_batch(0, work(GROUPS[0]))
    assert [row["index"] for row in Shards(tmp_path, "squares").rows()] == [0, 1]


def test_a_torn_group_of_another_rank_is_not_finished(tmp_path: Path) -> None:
    do(tmp_path, 1, 2)
    with open(tmp_path / "shards" / "squares-1.jsonl", "ab") as file:
        file.write(b'{"batch": 9, "batch_rows": 2, "id": "x", "index": 18}\n{"batch": 9, "ba')
    assert Shards(tmp_path, "squares", rank=0).finished() == {1, 3}


def test_damage_is_an_error(tmp_path: Path) -> None:
    do(tmp_path, 0, 1)
    path = tmp_path / "shards" / "squares-0.jsonl"
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(DataError, match="not a row of stepkd results"):
        Shards(tmp_path, "squares").rows()


def test_waiting_names_the_missing_ranks(tmp_path: Path) -> None:
    shards = do(tmp_path, 0, 4)
    said: list[str] = []
    with pytest.raises(StepkdError, match=r"rank 0 waits for 3 of 4 groups of squares, which belong to ranks 1, 2, 3,"):
        shards.wait(4, 4, timeout_s=0, say=said.append)
    assert said == ["rank 0 has finished its squares and waits for ranks 1, 2, 3"]


def test_waiting_ends_when_the_others_are_done(tmp_path: Path) -> None:
    """While another thread writes group after group, the reader sees whole groups only, and in the end all of them."""
    groups = [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(60)]
    mine, theirs = Shards(tmp_path, "squares", rank=0), Shards(tmp_path, "squares", rank=1)
    work_through(mine, groups, work, rank=0, world_size=2)
    writer = threading.Thread(target=work_through, args=(theirs, groups, work), kwargs={"rank": 1, "world_size": 2})
    writer.start()
    try:
        rows = mine.wait(len(groups), 2, timeout_s=60, poll_s=0.0005)
    finally:
        writer.join()
    assert [row["index"] for row in rows] == list(range(180))


def test_the_same_rank_twice_is_refused(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "squares", rank=2)
    with shards.writer(), pytest.raises(StepkdError, match=r"squares-2\.jsonl is already open"):
        shards.writer()
