from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import stepkd
from stepkd.errors import ConfigError, MachineError
from stepkd.runs.files import write_json
from stepkd.runs.rundir import RunDir, find_last_checkpoint, read_marker

RANK1 = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_ERROR_FILE": "/tmp/agent_a/none_x/attempt_0/1/error.json",
}
RANK0 = {**RANK1, "RANK": "0", "LOCAL_RANK": "0"}


def start(path: Path, **options: Any) -> RunDir:
    return RunDir.open(path, environ=options.pop("environ", {}), **options)


def checkpoint(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("data", "weights" * 50)
    return folder / name


def tree(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in sorted(path.rglob("*")) if item.is_file()}


def test_a_new_folder_is_made_with_its_marker(tmp_path: Path) -> None:
    run = start(tmp_path / "a" / "b")
    assert run.checkpoints.is_dir()
    assert run.resume_from is None
    assert "new run" in run.message
    marker = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert marker["kind"] == "fit"
    assert marker["status"] == "running"
    assert marker["stepkd"] == stepkd.__version__
    assert marker["command"]
    assert marker["created"].endswith("+00:00")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert start(tmp_path).path == tmp_path


def test_finished_and_failed_are_recorded(tmp_path: Path) -> None:
    run = start(tmp_path / "r")
    run.mark("failed", "loss is NaN")
    failed = read_marker(run.path)
    assert failed is not None
    assert (failed["status"], failed["message"]) == ("failed", "loss is NaN")
    run.mark("finished")
    finished = read_marker(run.path)
    assert finished is not None
    assert (finished["status"], finished["message"]) == ("finished", "")


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run = start(tmp_path / "r", kind="evaluate")
    checkpoint(run.checkpoints, "mine.ckpt")
    run.mark("finished")
    before = tree(run.path)
    with pytest.raises(ConfigError) as caught:
        start(run.path)
    text = str(caught.value)
    for part in ("--resume", "--overwrite", "--out", "'evaluate'", "finished", "mine.ckpt", "created 20"):
        assert part in text
    assert tree(run.path) == before


def test_both_flags_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contradict"):
        start(tmp_path / "r", resume=True, overwrite=True)
    assert not (tmp_path / "r").exists()


def test_resume_continues_and_keeps_the_creation_time(tmp_path: Path) -> None:
    first = start(tmp_path / "r")
    last = checkpoint(first.checkpoints, "last.ckpt")
    created = {**(read_marker(first.path) or {}), "created": "2020-01-01T00:00:00+00:00", "status": "failed"}
    write_json(first.path / "run.json", created)
    second = start(first.path, resume=True)
    assert second.resume_from == last
    assert "resuming from last.ckpt" in second.message
    marker = read_marker(second.path)
    assert marker is not None
    assert (marker["created"], marker["starts"], marker["status"]) == ("2020-01-01T00:00:00+00:00", 2, "running")


@pytest.mark.parametrize("exists", [False, True])
def test_resume_of_nothing_starts_fresh_and_says_so(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "r"
    if exists:
        path.mkdir()
    run = start(path, resume=True)
    assert run.resume_from is None
    assert "nothing to resume, starting fresh" in run.message


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    run = start(tmp_path / "r")
    again = start(run.path, resume=True)
    assert again.resume_from is None
    assert "left no checkpoint, starting from step 0" in again.message


def test_resume_with_a_torn_checkpoint_alone_is_refused(tmp_path: Path) -> None:
    """Starting again would overwrite what may still be mended."""
    run = start(tmp_path / "r")
    (run.checkpoints / "last.ckpt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ConfigError, match=r"holds last\.ckpt\. Put one back"):
        start(run.path, resume=True)


def test_resume_of_another_kind_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "r", kind="evaluate")
    with pytest.raises(ConfigError, match="of kind 'evaluate', so --resume cannot continue it as 'fit'"):
        start(tmp_path / "r", resume=True)


def test_overwrite_empties_a_run_of_ours(tmp_path: Path) -> None:
    run = start(tmp_path / "r")
    checkpoint(run.checkpoints, "last.ckpt")
    (run.path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep.txt").write_text("keep", encoding="utf-8")
    (run.path / "link").symlink_to(outside)
    fresh = start(run.path, overwrite=True)
    assert sorted(tree(fresh.path)) == ["run.json"]
    assert fresh.resume_from is None
    assert "was deleted" in fresh.message
    assert (outside / "keep.txt").read_text(encoding="utf-8") == "keep"


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("marker", [None, "{not json", '{"kind": "fit"}', "[1]"])
def test_foreign_folders_are_never_touched(tmp_path: Path, flags: dict[str, bool], marker: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    if marker is not None:
        (tmp_path / "run.json").write_text(marker, encoding="utf-8")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"not made by stepkd .*thesis.tex"):
        start(tmp_path, **flags)
    assert tree(tmp_path) == before


def test_an_interrupted_overwrite_is_not_resumed_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "r")
    checkpoint(run.checkpoints, "last.ckpt")
    run.mark("finished")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            start(run.path, overwrite=True)
    with pytest.raises(ConfigError, match="half deleted: an earlier --overwrite was interrupted"):
        start(run.path, resume=True)
    assert start(run.path, overwrite=True).resume_from is None
    assert not (run.checkpoints / "last.ckpt").exists()


@pytest.mark.parametrize(("step", "trained"), [(99, False), (100, True)])
def test_a_killed_run_that_lost_its_checkpoints_is_not_started_again(tmp_path: Path, step: int, trained: bool) -> None:
    """Its metrics go beyond the first checkpoint; those of a new start would stand behind them."""
    run = start(tmp_path / "r")
    (run.path / "config.yaml").write_text("checkpoint: {every_n_steps: 100}\n")
    (run.path / "metrics.jsonl").write_text(json.dumps({"run": 1, "step": step, "train/loss": 1.0}) + "\n")
    if trained:
        with pytest.raises(ConfigError, match=r"has trained and has no whole checkpoint left .* holds nothing"):
            start(run.path, resume=True)
    else:
        assert start(run.path, resume=True).resume_from is None


@pytest.mark.parametrize("ended", [None, "stopped", "failed"])
def test_a_run_that_keeps_no_checkpoints_starts_again(tmp_path: Path, ended: Any) -> None:
    """As a scheduler has it that queues it again after SIGTERM."""
    run = start(tmp_path / "r")
    (run.path / "config.yaml").write_text("checkpoint: {every_n_steps: null}\n")
    (run.path / "metrics.jsonl").write_text(json.dumps({"run": 1, "step": 9, "train/loss": 1.0}) + "\n")
    if ended is not None:
        run.mark(ended)
    assert start(run.path, resume=True).resume_from is None
    run.mark("finished")
    with pytest.raises(ConfigError, match="has trained and has no whole checkpoint left"):
        start(run.path, resume=True)


def test_a_lost_last_checkpoint_says_where_the_run_goes_on(tmp_path: Path) -> None:
    import torch

    run = start(tmp_path / "r")
    facts = {"global_step": 40, "stepkd": {"policy": {}}, "state_dict": {}}
    torch.save(facts, run.checkpoints / "best.ckpt")
    (run.checkpoints / "export").mkdir()
    (run.checkpoints / "export" / "model.safetensors").write_bytes(b"newer, and no checkpoint")
    again = start(run.path, resume=True)
    assert again.resume_from == run.checkpoints / "best.ckpt"
    assert "resuming from best.ckpt at step 40 (last.ckpt is torn or missing)" in again.message


def test_a_file_at_the_path_or_above_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        start(tmp_path / "file")
    with pytest.raises(MachineError, match=r"file/run: Not a directory\. A part of that path is a file"):
        start(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EACCES, "Permission denied. Write to a folder that you may"),
        (errno.EROFS, "Read-only file system. Write to a folder that you may"),
        (errno.ENOSPC, "No space left .*Free some space there"),
        (errno.EIO, "Input/output error. Look at the disk"),
    ],
)
def test_system_errors_become_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(MachineError, match=f"cannot write {tmp_path / 'r'}: {message}"):
        start(tmp_path / "r")


def test_a_full_disk_leaves_the_old_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path / "r")
    before = tree(run.path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left"):
        run.mark("finished")
    assert tree(run.path) == before
    run.mark("failed", "no space for metrics")
    marker = read_marker(run.path)
    assert marker is not None
    assert (marker["status"], marker["message"]) == ("failed", "no space for metrics")


def test_a_full_disk_does_not_keep_an_overwrite_from_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path / "r")
    checkpoint(run.checkpoints, "last.ckpt")
    run.mark("finished")
    left: list[bool] = []

    def full_until_deleted(fd: int) -> None:
        left.append((run.checkpoints / "last.ckpt").exists())
        if left[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_until_deleted)
    assert start(run.path, overwrite=True).resume_from is None
    assert left[0], "the disk was full when it began"
    assert not (run.checkpoints / "last.ckpt").exists()


def test_other_ranks_neither_fail_nor_write(tmp_path: Path) -> None:
    path = tmp_path / "r"
    early = start(path, environ=RANK1)
    assert not path.exists(), "rank 0 makes the folder"
    start(path, environ=RANK0)
    before = tree(path)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        start(path, environ=RANK1, **flags)
    early.mark("finished")
    early.mark("failed", "x")
    assert tree(path) == before


def test_all_ranks_agree_on_the_checkpoint(tmp_path: Path) -> None:
    run = start(tmp_path / "r", environ=RANK0)
    last = checkpoint(run.checkpoints, "last.ckpt")
    run.mark("finished")
    assert start(run.path, environ=RANK1).resume_from is None
    ranks = [start(run.path, environ=environ, resume=True).resume_from for environ in (RANK0, RANK1)]
    assert ranks == [last, last]


def restart(environ: dict[str, str], attempt: int, agent: str = "agent_a") -> dict[str, str]:
    file = f"/tmp/{agent}/none_x/attempt_{attempt}/{environ['RANK']}/error.json"
    return {**environ, "TORCHELASTIC_RESTART_COUNT": str(attempt), "TORCHELASTIC_ERROR_FILE": file}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_elastic_restart_resumes_by_itself(tmp_path: Path, overwrite: bool) -> None:
    run = start(tmp_path / "r", environ=restart(RANK0, 0), overwrite=overwrite)
    last = checkpoint(run.checkpoints, "last.ckpt")
    for environ in (RANK0, RANK1):
        assert start(run.path, environ=restart(environ, 1), overwrite=overwrite).resume_from == last
    assert last.exists()


def test_a_restart_does_not_take_over_another_launch(tmp_path: Path) -> None:
    run = start(tmp_path / "r", environ=restart(RANK0, 0))
    run.mark("finished")
    with pytest.raises(ConfigError, match="already holds a run"):
        start(run.path, environ=restart(RANK0, 1, agent="agent_b"))


def test_a_requeued_slurm_job_resumes_by_itself(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}
    run = start(tmp_path / "r", environ=job)
    last = checkpoint(run.checkpoints, "last.ckpt")
    assert start(run.path, environ={**job, "SLURM_RESTART_COUNT": "1"}).resume_from == last
    with pytest.raises(ConfigError, match="already holds a run"):
        start(run.path, environ={**job, "SLURM_JOB_ID": "6", "SLURM_RESTART_COUNT": "1"})


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_a_folder_in_use_is_left_alone(tmp_path: Path, flags: dict[str, bool], repo_root: Path) -> None:
    code = (
        "import sys\nfrom stepkd.runs.rundir import RunDir\n"
        "RunDir.open(sys.argv[1], environ={})\nprint('ready', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
            start(tmp_path / "r", **flags)
        other.kill()
    # Killed without a word: status is still "running", but nobody is there.
    assert start(tmp_path / "r", **flags).path == tmp_path / "r"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], None),
        (["best.ckpt", "mine.ckpt"], "mine.ckpt"),
        (["mine.ckpt", "best.ckpt"], "best.ckpt"),
        (["last.ckpt", "best.ckpt"], "last.ckpt"),
        (["best.ckpt", ".mine.ckpt"], "best.ckpt"),
    ],
)
def test_the_last_checkpoint_or_that_written_last(tmp_path: Path, names: list[str], expected: str | None) -> None:
    run = start(tmp_path / "r")
    for second, name in enumerate(names):
        os.utime(checkpoint(run.checkpoints, name), (second, second))
    found = find_last_checkpoint(run.checkpoints)
    assert (None if found is None else found.name) == expected


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    run = start(tmp_path / "r")
    good = checkpoint(run.checkpoints, "best.ckpt")
    torn = checkpoint(run.checkpoints, "mine.ckpt")
    torn.write_bytes(torn.read_bytes()[:-60])
    (run.checkpoints / "last.ckpt").symlink_to(run.checkpoints / "gone.ckpt")
    (run.checkpoints / "sharded.ckpt").mkdir()
    assert find_last_checkpoint(run.checkpoints) == good
    (run.checkpoints / "sharded.ckpt" / "mp_rank_00_model_states.pt").write_bytes(b"a shard of DeepSpeed")
    os.utime(good, (0, 0))
    assert find_last_checkpoint(run.checkpoints) == run.checkpoints / "sharded.ckpt"


def test_a_real_torch_checkpoint_is_whole_until_cut(tmp_path: Path) -> None:
    import torch

    run = start(tmp_path / "r")
    path = run.checkpoints / "last.ckpt"
    torch.save({"weight": torch.zeros(100)}, path)
    assert find_last_checkpoint(run.checkpoints) == path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert find_last_checkpoint(run.checkpoints) is None
