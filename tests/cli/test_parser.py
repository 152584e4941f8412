"""Settings classes on the command line: words, files, unions, and what is said of a mistake."""

from __future__ import annotations

import importlib
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from inspect import isabstract
from pathlib import Path
from pkgutil import walk_packages
from typing import ClassVar, Literal

import pytest
import yaml

import stepkd
from stepkd.cli import COMMANDS, parser
from stepkd.cli.parser import parse
from stepkd.errors import ConfigError, check_bounds
from stepkd.runs.job import CONFIG_NAME, Job, JobConfig
from stepkd.settings import SYNONYMS, build_settings
from stepkd.yaml_files import as_yaml, yaml_text


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    temperature: float = 1.0
    """Divides the logits, 0 or more."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""

    def __post_init__(self) -> None:
        check_bounds("sampling.", self, temperature="[0, inf)")


class Teacher(ABC):
    """A choice."""

    @abstractmethod
    def build(self) -> str:
        """What it makes."""


@dataclass(frozen=True)
class Served(Teacher):
    """A server."""

    url: str
    """Where it is."""
    n: int = 1
    """How many answers."""

    def build(self) -> str:
        return self.url


@dataclass(frozen=True)
class Local(Teacher):
    """A folder."""

    path: str = "tiny"
    """The folder."""
    fast: bool = False
    """Whether to hurry."""
    sampling: Sampling = field(default_factory=lambda: Sampling())
    """What it samples."""

    def __post_init__(self) -> None:
        if self.path == "/":
            raise ConfigError("the folder / is no teacher")

    def build(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class Example(JobConfig):
    """A command."""

    POSITIONAL: ClassVar = ("source", "names")

    source: str
    """What it works on."""
    names: tuple[str, ...] = ()
    """More of it."""
    mode: Literal["fast", "slow"] = "fast"
    """How to do it."""
    teacher: Teacher = field(default_factory=Local)
    """Who is asked."""
    asked: Teacher | str = "nobody"
    """Who is asked second: a word, or a class."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.5))
    """What is sampled."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens."""
    note: str | None = None
    """A text."""


def read(*words: str) -> Example:
    found = parse(Example, words, command="example", description="An example.\n  As it stands.")
    assert isinstance(found, Example)
    return found


PLAIN = Example(out="o", source="s")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("s --out o", PLAIN),
        ("--out=o --source s", PLAIN),
        ("s a b --out o", replace(PLAIN, names=("a", "b"))),
        ("s --out o --max-new-tokens 7", replace(PLAIN, max_new_tokens=7)),
        ("s --out o --max_new_tokens -7", replace(PLAIN, max_new_tokens=-7)),
        ("--out o --overwrite s", replace(PLAIN, overwrite=True)),
        ("s --out o --overwrite false --mode slow", replace(PLAIN, mode="slow")),
        ("s --out o --sampling.stop a 1 --sampling.stop c", replace(PLAIN, sampling=Sampling(0.5, ("a", "1", "c")))),
        ("""s --out o --sampling.stop ["a","1"]""", replace(PLAIN, sampling=Sampling(0.5, ("a", "1")))),
        ("s --out o --sampling.stop [/INST] [x", replace(PLAIN, sampling=Sampling(0.5, ("[/INST]", "[x")))),
        ("s --out o --max-new-tokens null", PLAIN),
        ("s --out o --teacher Served --teacher.url http://x", replace(PLAIN, teacher=Served("http://x"))),
        ("s --out o --teacher.fast --teacher.path p", replace(PLAIN, teacher=Local("p", fast=True))),
    ],
)
def test_words_become_settings(words: str, expected: Example) -> None:
    assert read(*words.split()) == expected


def test_files_come_first_and_options_go_before_them(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("source: s\nout: o\nmode: slow\nteacher: {class_path: Served, init_args: {url: u}}\n")
    second.write_text("out: p\nsampling: {temperature: 0}\n")
    found = read("--config", str(first), "--config", str(second), "--teacher.n", "3")
    assert found == replace(PLAIN, out="p", mode="slow", teacher=Served("u", 3), sampling=Sampling(0.0))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("s --out o --temperature 3", "'temperature' is not a setting; did you mean --sampling.temperature or --"),
        (
            "s --out o --sampling.temperatur 3",
            "'temperatur' is not a setting of sampling; did you mean --samp",
        ),
        ("s --out o --max-new-token 3", "'max_new_token' is not a setting; did you mean --max_new_tokens?"),
        ("s --output-dir o", "'output_dir' is not a setting; did you mean --out?"),
        ("s --out o --teacher Servd", "teacher: no class 'Servd'; did you mean 'Served'?"),
        (
            "s --out o --teacher Served --teacher.path p",
            "'path' is not a setting of teacher; name a class that has it: --teacher Local --teacher.path VALUE",
        ),
        ("s --out o --teacher.url u", "'url' is not a setting of teacher; name a class that has it: --teacher Served"),
        ("s --out o --asked.url u", "'url' is not a setting of asked; name a class that has it: --asked Served"),
        ("s --out o --asked.nothing u", "asked names no class that has settings: --asked {Served, Local}"),
        ("s --out o --asked Served", "give --asked.url"),
        ("s --out o --asked Served --asked.url u --asked.n many", "asked.n: expected int, got 'many'"),
        ("s --out o --teacher.sampling.temperature hot", "teacher.sampling.temperature: expected float, got 'hot'"),
        ("s --out o --teacher.sampling.temperature -1", "teacher.sampling.temperature=-1.0: must be 0 or positive"),
        ("s --out o --teacher.path /", "teacher: the folder / is no teacher"),
        ("s --out o --teacher.help Servd", "teacher: no class 'Servd'; did you mean 'Served'?"),
        ("s --out o --teacher.pth p", "'pth' is not a setting of teacher; did you mean --teacher.path?"),
        ("s --out o --teacher Served", "give --teacher.url"),
        ("s", "give --out"),
        ("s --out", "--out has no value (one that begins with - is written --out=VALUE)"),
        ("s --teacher.path --out o", "--teacher.path has no value"),
        ("s --out o --max-new-tokens two --print_config", "max_new_tokens: expected int"),
        ("s --out o --config=", "--config has no value: give a file, or a recipe's name"),
        ("--out o", "give SOURCE: stepkd example SOURCE NAMES"),
        ("s --out o --mode quick", "mode: expected one of ['fast', 'slow'], got 'quick'"),
        ("s --out o --sampling.temperature hot", "sampling.temperature: expected float, got 'hot'"),
        ("s --out o --sampling.temperature -1", "sampling.temperature=-1.0: must be 0 or positive"),
        ("s --out o --overwrite=perhaps", "overwrite: expected bool, got 'perhaps'"),
        ("s --out o --wait-s -1", "wait_s=-1.0: must be 0 or positive"),
        ("s --out o --mode slow x", "'x' belongs to no setting"),
    ],
)
def test_a_mistake_is_one_line(words: str, expected: str) -> None:
    kind = replace_positional() if words.endswith(" x") else Example
    with pytest.raises(ConfigError) as caught:
        parse(kind, words.split(), command="example")
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["~", "###", "# Solve it", "#"])
def test_a_text_that_yaml_takes_for_null_stays_text(text: str, tmp_path: Path) -> None:
    """A step marker, or a prompt that begins with a heading."""
    assert read("s", "--out", "o", "--note", text).note == text
    (tmp_path / "a.yaml").write_text(f'note: "{text}"\n')
    assert read("s", "--out", "o", "--config", str(tmp_path / "a.yaml")).note == text
    (tmp_path / "a.yaml").write_text("note: null\n")
    assert read("s", "--out", "o", "--config", str(tmp_path / "a.yaml")).note is None


def replace_positional() -> type:
    """The command with one free word."""
    return type("OneWord", (Example,), {"POSITIONAL": ("source",)})


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("sampling: {temp: 1}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: 'temp' is not a setting of sampling"):
        read("s", "--config", str(path))


def test_help_shows_every_field_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: stepkd example SOURCE NAMES" in text
    assert "An example.\n  As it stands." in text
    for words in ("What it works on.", "Divides the logits, 0 or more.", "Delete an earlier job of this kind"):
        assert words in " ".join(text.split())


def test_print_config_is_what_a_job_leaves_beside_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["s", "--out", str(tmp_path / "job"), "--teacher", "Served", "--teacher.url", "u", "--wait_s", "0"]
    with pytest.raises(SystemExit):
        read(*words, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    config, started = read(*words).start({})
    Job(Path(config.out), "example job", options=started).begin({})
    written = tmp_path / "job" / CONFIG_NAME
    del printed["overwrite"]  # what repeats a job deletes nothing
    assert yaml.safe_load(written.read_text()) == printed
    assert read("--config", str(written)) == read(*words)
    anew = read(*words, "--overwrite").start({})[1]
    Job(Path(config.out), "example job", options=anew).begin({})
    assert not read("--config", str(written)).overwrite
    other = read(*words, "--mode", "slow").start({})[1]
    Job(Path(config.out), "example job", options=other).begin({})  # not compared: what decides is in settings.json
    assert "mode: slow" in written.read_text()


def test_a_mapping_becomes_settings_as_words_do() -> None:
    values = {"out": "o", "source": "s", "teacher": {"class_path": "Served", "init_args": {"url": "u"}}}
    found = build_settings(Example, values, "here")
    assert found == replace(PLAIN, teacher=Served("u"))
    assert build_settings(Example, as_yaml(found), "here") == found
    assert yaml.safe_load(yaml_text(found))["teacher"]["init_args"] == {"url": "u", "n": 1}
    for incorrect, expected in (
        ({"temperature": 1}, "here: 'temperature' is not a setting; did you mean 'sampling.temperature'?"),
        ({"sampling": {"temperature": "x"}}, "here: sampling.temperature: expected float, got 'x'"),
        ({"sampling": {"temperature": -1}}, "here: sampling.temperature=-1.0: must be 0 or positive"),
        ({"mode": None}, "here: mode has no value"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_settings(Example, {**values, **incorrect}, "here")
        assert str(caught.value) == expected


def test_few_synonyms_are_written_by_hand() -> None:
    assert len(SYNONYMS) <= 10


HEAVY = ("torch", "lightning", "transformers", "datasets", "math_verify")
LIGHT = """
import sys
from stepkd.cli import main
for words in {lines!r}:
    try:
        main(words)
    except SystemExit:
        pass
    found = [name for name in {heavy!r} if name in sys.modules]
    if found:
        sys.exit(f"{{words}} loads {{found}}")
"""


def test_help_and_parsing_load_nothing_heavy() -> None:
    """A clock says different things on different machines; the list of loaded modules does not."""
    lines = []
    for command in sorted(COMMANDS):
        module = importlib.import_module(f"stepkd.cli.{command.replace('-', '_')}")
        starts = [[command, action] for action in getattr(module, "ACTIONS", ())] or [[command]]
        lines += [[*start, word] for start in starts for word in ("--help", "--print_config", "--no_such_setting=1")]
    code = LIGHT.format(lines=lines, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_overview_loads_no_parser() -> None:
    code = LIGHT.format(lines=[["--help"]], heavy=(*HEAVY, "argparse", "jsonargparse", "yaml"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_options_are_fields_of_settings_classes() -> None:
    """No option is declared by hand, but the one that names files."""
    sources = Path(parser.__file__).parents[1].rglob("*.py")
    declared = [line for path in sources for line in path.read_text().splitlines() if "add_argument(" in line]
    assert len(declared) == 1
    assert '"--config", action="config"' in declared[0]


def test_a_class_that_is_chosen_has_its_own_defaults() -> None:
    """A parser hands values of the class before on to the one that is chosen, by name."""
    for module in walk_packages(stepkd.__path__, "stepkd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = [kind for kind in _below(object) if str(kind.__module__).startswith("stepkd.") and is_dataclass(kind)]
    seen = 0
    for owner, each in ((kind, each) for kind in kinds for each in fields(kind)):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if not is_dataclass(default) or isinstance(default, type):
            continue
        before = {name.name: getattr(default, name.name) for name in fields(default)}
        bases = [base for base in type(default).__mro__ if isabstract(base)]
        for other in {other for base in bases for other in _below(base) if is_dataclass(other)}:
            for own in fields(other):
                value = own.default if own.default_factory is MISSING else own.default_factory()
                if own.init and own.name in before and value is not MISSING:
                    assert value == before[own.name], f"{owner.__name__}.{each.name}: {other.__name__}.{own.name}"
                    seen += 1
    assert seen


def _below(kind: type) -> set[type]:
    """Every class below a class."""
    direct = type.__subclasses__(kind)
    return {*direct, *(each for below in direct for each in _below(below))}


class Own(ABC):  # noqa: B024
    """A choice that no other test shows."""


class Plain(Own):
    """A choice of one's own that is no dataclass."""

    def __init__(self, sampling: Sampling, n: int = 2) -> None:
        if n < 1:
            raise ConfigError(f"n={n} must be at least 1")
        self.sampling, self.n = sampling, n


@dataclass(frozen=True)
class HasTeacher:
    """Settings with a choice."""

    teacher: Own
    """Who teaches."""


def test_a_class_of_ones_own_that_is_no_dataclass_is_built() -> None:
    given = {"class_path": f"{__name__}.Plain", "init_args": {"sampling": {"temperature": 0.5}}}
    made = build_settings(HasTeacher, {"teacher": given}, "here").teacher
    assert isinstance(made, Plain)
    assert (made.sampling, made.n) == (Sampling(0.5), 2)
    assert build_settings(HasTeacher, {"teacher": given | {"dict_kwargs": {}}}, "here").teacher.n == 2
    given["init_args"] |= {"n": 0}
    with pytest.raises(ConfigError, match=r"here: teacher\.n=0 must be at least 1"):
        build_settings(HasTeacher, {"teacher": given}, "here")
