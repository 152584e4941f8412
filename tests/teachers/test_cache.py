"""A teacher's cache: what it holds, going on after a kill, and everything that it must refuse."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.data.collate import collate
from stepkd.data.encode import Encoder
from stepkd.data.templates import get_template
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.losses import forward_kl
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.fidelity import FidelityConfig
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import NKD, SourceConfig
from stepkd.runs.job import JobOptions
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import make_rows
from stepkd.teachers import cache
from stepkd.teachers.cache import CachedTeacher, write_cache
from stepkd.teachers.config import Cached, Local, TopK
from stepkd.teachers.local import LocalTeacher

TEACHER = Local("tiny-0.1m", dtype="float64")


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    encoder = Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline"))
    return list(encoder.examples(make_rows("modular:terms=2-6", 7, seed=4)))


@pytest.fixture(scope="module")
def student() -> Policy:
    return Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", init_seed=3))


@pytest.fixture
def teacher(student: Policy) -> LocalTeacher:
    made = TEACHER.build()
    made.bind(student.tokenizer)
    return made


@pytest.fixture
def folder(teacher: LocalTeacher, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished cache in three parts."""
    monkeypatch.setattr(cache, "PART_SIZE", 3)
    write_cache(tmp_path / "cache", teacher, rows, top_k=5, max_tokens=60, chunk_size=4)
    return tmp_path / "cache"


def values(teacher: Any, student: Policy, rows: list[Any]) -> torch.Tensor:
    """Forward KL at every target under a teacher's signals."""
    batch = collate(rows, 0)
    signals = teacher.signals(batch, temperature=1.0)
    with torch.no_grad():
        hidden_NH = student.hidden(batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)[batch.needed_N]
        own, other, argmax_C = signals.compare(student.head(hidden_NH).log_softmax(-1), *signals.tensors)
    assert argmax_C.shape == batch.targets_N.shape
    return forward_kl(own, other)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("top_k", [5, 2])
def test_a_cache_says_what_its_teacher_says(
    folder: Path, student: Policy, rows: list[Any], top_k: int, tail: bool
) -> None:
    local = replace(TEACHER, top_k=TopK(top_k, tail)).build()
    cached = Cached(str(folder), top_k=TopK(top_k, tail)).build()
    for each in (local, cached):
        each.bind(student.tokenizer)
    expected = values(local, student, rows)
    found = values(cached, student, rows[::-1])
    sizes = [len(row.token_ids) for row in rows]
    reversed_back = torch.cat(found.split(sizes[::-1])[::-1])
    torch.testing.assert_close(reversed_back, expected, rtol=1e-5, atol=1e-6)
    assert all(mine is row.prompt_ids for mine, row in zip(cached.prompts(rows), rows, strict=True))


def test_a_cache_is_computed_in_the_precision_of_the_run(student: Policy, rows: list[Any], tmp_path: Path) -> None:
    teacher = replace(TEACHER, dtype="float32", top_k=TopK(5)).build()
    teacher.bind(student.tokenizer)
    with torch.no_grad():
        for parameter in teacher.policy.parameters():  # sure of its tokens, so that rounding shows
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        write_cache(tmp_path / precision, teacher, rows, top_k=5, precision=precision)
        cached = Cached(str(tmp_path / precision)).build()
        cached.bind(student.tokenizer)
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed"):
            signals = teacher.signals(collate(rows, 0), temperature=1.0)
            log_student = torch.zeros(len(signals.tensors[0]), 100).log_softmax(-1)
            expected = signals.compare(log_student, *signals.tensors).log_teacher_CW.float()
        own = cached.signals(collate(rows, 0), temperature=1.0)
        found[precision] = own.compare(log_student, *own.tensors).log_teacher_CW
        assert (found[precision] - expected)[:, :-1].abs().max() < 1e-4
        other = {"32-true": "bf16-mixed", "bf16-mixed": "32-true"}[precision]
        with pytest.raises(ConfigError, match=rf"written with precision {precision}, this run has {other}"):
            cached.start(other, None)
        with pytest.raises(ConfigError, match=rf"precision: '{precision}' then"):
            write_cache(tmp_path / precision, teacher, rows, top_k=5, precision=other)
    assert (found["32-true"] - found["bf16-mixed"])[:, :-1].abs().max() > 1e-3


def test_rows_beyond_the_teachers_context_are_refused(teacher: LocalTeacher, rows: list[Any], tmp_path: Path) -> None:
    longest = max(rows, key=lambda row: row.length)
    teacher.max_length = longest.length - 1
    message = rf"row '{longest.id}' has {longest.length} tokens and the teacher's context is {longest.length - 1}"
    with pytest.raises(ConfigError, match=message):
        write_cache(tmp_path / "cache", teacher, rows, top_k=5)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match=message):
        teacher.signals(collate(rows, 0), temperature=1.0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_job_is_resumed_by_any_number_of_ranks(
    teacher: LocalTeacher, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(cache, "PART_SIZE", 3)
    done: list[int] = []

    def kill(phase: str, count: int, total: int, figures: Any) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "a", teacher, rows, top_k=4, options=JobOptions(report=kill))
    assert done == [3, 6]
    with pytest.raises(ModelError, match=r"holds 6 of 7 completions: give `stepkd cache-teacher` the same command"):
        Cached(str(tmp_path / "a")).build().bind(tiny_tokenizer())
    parts = tmp_path / "a" / "parts" / "completions"
    (parts / ".000002.safetensors.ab.tmp").write_bytes(b"{")
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.safetensors")}
    again = [*rows, rows[0]]  # a row twice is written once
    found = [
        write_cache(tmp_path / "a", teacher, again, top_k=4, options=JobOptions(rank=rank, world_size=ranks))
        for rank in reversed(range(ranks))
    ]
    assert found[:-1] == [{}] * (ranks - 1)
    assert found[-1] == write_cache(tmp_path / "b", teacher, rows, top_k=4)
    assert all((parts / name).stat().st_mtime_ns == time for name, time in before.items())
    for path in [tmp_path / "b" / "settings.json", *(tmp_path / "b" / "parts" / "completions").iterdir()]:
        assert (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes() == path.read_bytes(), path.name
    assert len(list(parts.iterdir())) == 3


def test_another_job_is_refused(folder: Path, teacher: LocalTeacher, rows: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k: 5 then, 4 now"):
        write_cache(folder, teacher, rows, top_k=4)
    with pytest.raises(ConfigError, match="completions: 7 then, 6 now"):
        write_cache(folder, teacher, rows[1:], top_k=5)
    with pytest.raises(ConfigError, match="top_k=0: must lie between 1 and"):
        write_cache(tmp_path / "x", teacher, rows, top_k=0)
    everything = teacher.policy.vocab_size
    with pytest.raises(ConfigError, match=f"top_k={everything}: must lie between 1 and {everything - 1}"):
        write_cache(tmp_path / "x", teacher, rows, top_k=everything)
    with pytest.raises(DataError, match="no row has a completion to score"):
        write_cache(tmp_path / "x", teacher, [replace(rows[0], token_ids=(), step_ends=())], top_k=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty \(notes.txt\) and holds no teacher's cache"):
        write_cache(tmp_path / "full", teacher, rows, top_k=2)


def part(folder: Path) -> Path:
    return folder / "parts" / "completions" / "000001.safetensors"


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def another_caches_part(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"threads": 99}))


def of_version_0_1(folder: Path) -> None:
    (folder / "settings.json").rename(folder / "manifest.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: flip(part(folder), -200), r"000001\.safetensors is damaged or was changed \(its hash differs"),
        (lambda folder: part(folder).write_bytes(b""), r"000001\.safetensors is damaged or was changed \(Safetensor"),
        (another_caches_part, r"00000.\.safetensors is damaged or was changed \(its hash differs\)"),
        (lambda folder: part(folder).unlink(), r"holds 4 of 7 completions: give `stepkd cache-teacher`"),
        (of_version_0_1, r"no teacher's cache that this version reads in .*: write one with `stepkd cache-teacher`"),
        (lambda folder: (folder / "settings.json").write_text("{}"), "not the settings of a job"),
        (lambda folder: (folder / "settings.json").write_text('{"kind": "evaluation"}'), r"another kind of job \(eval"),
        (lambda folder: (folder / "settings.json").write_text("{"), "not the settings of a job"),
    ],
)
def test_what_is_damaged_is_refused(folder: Path, student: Policy, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        Cached(str(folder)).build().bind(student.tokenizer)


def test_no_flipped_bit_changes_an_entry_in_silence(folder: Path, student: Policy) -> None:
    whole = Cached(str(folder)).build()
    whole.bind(student.tokenizer)
    content = part(folder).read_bytes()
    draw, refused = random.Random(0), 0
    for place in draw.sample(range(len(content)), 400):
        part(folder).write_bytes(content)
        flip(part(folder), place, draw.randrange(8))
        cached = Cached(str(folder)).build()
        try:
            cached.bind(student.tokenizer)
        except ModelError:
            refused += 1
            continue
        for key, entry in whole._entries.items():
            assert all(torch.equal(a, b) for a, b in zip(entry, cached._entries[key], strict=True)), place
    assert refused > 200


def test_what_it_does_not_know_is_refused(folder: Path, student: Policy, rows: list[Any]) -> None:
    cached = Cached(str(folder)).build()
    cached.bind(student.tokenizer)
    changed = replace(rows[2], token_ids=rows[2].token_ids[:-1], step_ends=None)
    with pytest.raises(ConfigError, match=rf"does not hold the completion of row '{changed.id}' \(of 7 it does\)"):
        cached.signals(collate([rows[0], changed], 0), temperature=1.0)
    with pytest.raises(ConfigError, match=r"was written with temperature 1.0, this run has 2.0"):
        cached.signals(collate(rows, 0), temperature=2.0)
    with pytest.raises(ConfigError, match=r"teacher.top_k.k=6, and the cache in .* holds 5 tokens"):
        Cached(str(folder), TopK(6)).build()
    empty = replace(rows[0], token_ids=(), step_ends=())
    assert cached.signals(collate([empty], 0), temperature=1.0).tensors[0].shape == (0, 5)


def test_a_student_with_other_rows_is_refused(folder: Path, student: Policy) -> None:
    with pytest.raises(ConfigError, match=rf"with vocabulary {student.vocab_size}, this run has 9"):
        Cached(str(folder)).build().bind(student.tokenizer, 9)
    Cached(str(folder)).build().bind(student.tokenizer, student.vocab_size)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"tokenizer": "0" * 16}))
    with pytest.raises(ConfigError, match=r"was written with tokenizer 0000000000000000, this run has"):
        Cached(str(folder)).build().bind(student.tokenizer)


def test_identity_tells_caches_apart(folder: Path, teacher: LocalTeacher, rows: list[Any], tmp_path: Path) -> None:
    write_cache(tmp_path / "smaller", teacher, rows, top_k=2)
    assert Cached(str(folder)).build().identity() == Cached(str(folder)).build().identity()
    assert Cached(str(folder)).build().identity() != Cached(str(tmp_path / "smaller")).build().identity()


def test_a_module_refuses_what_no_cache_can_do(folder: Path) -> None:
    spec, data = Cached(str(folder)), SourceConfig(lmbda=0.0)
    policy = PolicyConfig(path="tiny-0.1m")
    assert isinstance(GKDModule(policy, spec, source=data).teacher, CachedTeacher)
    with pytest.raises(
        ConfigError,
        match=r"source.lmbda=0.5 samples from the student, and the teacher Cached knows only the completions",
    ):
        GKDModule(policy, spec)
    with pytest.raises(
        ConfigError,
        match="divergence NKD reads the whole distribution, and the teacher Cached holds no whole distribution",
    ):
        GKDModule(policy, spec, NKD(), data)
    with pytest.raises(ConfigError, match="fidelity compares on fresh samples"):
        GKDModule(policy, spec, source=data, fidelity=FidelityConfig())


RECIPE = """
trainer: {accelerator: cpu, max_steps: 3, val_check_interval: 3, check_val_every_n_epoch: null}
model:
  class_path: stepkd.modules.GKDModule
  init_args:
    policy: {path: tiny-0.1m, init_seed: 5}
    teacher: {class_path: Local, init_args: {path: tiny-0.1m, top_k: {k: 6}}}
    divergence: {class_path: ForwardKL}
    source: {lmbda: 0.0}
    optimizer: {lr: 1.0e-3, schedule: constant, warmup: 0}
data:
  class_path: stepkd.data.StepData
  init_args:
    train: {source: task, options: {task: 'modular:terms=2-4', n: 16}}
    validation: {source: task, split: validation, options: {task: 'modular:terms=2-4', n: 4}}
    template: task
    global_batch_size: 8
    overlap_ngram: 0
"""


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training from the cache is training from the teacher, without the teacher."""
    from stepkd.runs.logger import read_metrics

    recipe = tmp_path / "gkd.yaml"
    recipe.write_text(RECIPE)
    command = ["cache-teacher", "--recipe", str(recipe), "--top-k", "6", "--out", str(tmp_path / "cache")]
    assert main(command) == 0
    assert "20 completions, 6 tokens per position" in capsys.readouterr().out
    assert main(["fit", "--config", str(recipe), "--out", str(tmp_path / "local")]) == 0
    cached = ["--model.teacher", "Cached", "--model.teacher.folder", str(tmp_path / "cache")]
    assert main(["fit", "--config", str(recipe), "--out", str(tmp_path / "cached"), *cached]) == 0
    for name in ("train/loss", "train/agreement", "val/loss"):
        local, other = (
            [row[name] for row in read_metrics(tmp_path / run) if name in row] for run in ("local", "cached")
        )
        assert other == pytest.approx(local, rel=1e-4), name
        assert local
    assert all(math.isfinite(value) for value in local)
    capsys.readouterr()
    mixed = ["--trainer.precision", "bf16-mixed"]
    assert main(["fit", "--config", str(recipe), "--out", str(tmp_path / "mixed"), *cached, *mixed]) == 2
    assert "was written with precision 32-true, this run has bf16-mixed" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "mixed-cache"), "--set", "trainer.precision=bf16-mixed"]) == 0
    assert json.loads((tmp_path / "mixed-cache" / "settings.json").read_text())["precision"] == "bf16-mixed"
    assert main([*command, "--set", "model.source.lmbda"]) == 2
    assert "write KEY=VALUE" in capsys.readouterr().err
    assert main([*command, "--set", "data.init_args.max_length=20"]) == 2
    assert "begun under other settings" in capsys.readouterr().err
    sft = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "sft.yaml"
    assert main(["cache-teacher", "--recipe", str(sft), "--out", str(tmp_path / "x")]) == 2
    assert "needs a distillation recipe" in capsys.readouterr().err
