"""What the jobs of ``stepkd label`` load: rows, the policy with its prompt template, and a grader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepkd.data.benchmarks import Benchmark
from stepkd.data.io import fingerprint
from stepkd.data.rows import PROBLEM, check_unique_ids
from stepkd.data.spec import DataSpec, load_rows, parse_spec, resolve_split
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError
from stepkd.grading import Grader
from stepkd.labels.given import given_rows
from stepkd.labels.settings import JobSpec, asking
from stepkd.models import Policy
from stepkd.models.checkpoint import load_trained
from stepkd.models.trained_template import template_for


@dataclass(frozen=True)
class JobData:
    """The rows of a job."""

    spec: DataSpec
    """Where they came from."""
    rows: list[dict[str, Any]]
    """Problems, or solutions; their ids are unique."""
    drawn: bool
    """Whether these are problems whose solutions are to be drawn, not solutions."""
    asking: Benchmark
    """Whose template, extractors and length suit them."""

    @property
    def place(self) -> str:
        """Where the rows came from, for messages."""
        return self.spec.path or self.spec.source

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the data; no paths."""
        return {
            "source": f"{self.spec.source}:{resolve_split(self.spec)}",
            "rows": len(self.rows),
            "fingerprint": fingerprint(self.rows),
            "options": dict(self.spec.options),
        }


def load_job_data(word: str, *, problems: bool, limit: int | None = None) -> JobData:
    """Rows of a job from one command-line word.

    Args:
        word: file, folder or data settings.
        problems: whether the word names problems, not solutions.
        limit: only the first rows; None: all.

    Raises:
        ConfigError, DataError: the rows cannot be read, have no solutions, or share an id.
    """
    data = parse_spec(word)
    if limit is not None:
        data = dataclasses.replace(data, limit=limit)
    rows = load_rows(data, contract=PROBLEM) if problems else given_rows(data)
    check_unique_ids(rows, path=data.path or data.source)
    is_task = all("task" in row and "meta" in row for row in rows)
    return JobData(data, rows, problems, asking(data.source, is_task=is_task))


@dataclass(frozen=True)
class Workbench:
    """What every job works with."""

    policy: Policy
    """Samples, continues and tokenises; still on the CPU."""
    model: str
    """Its name."""
    template: PromptTemplate
    """How a problem becomes a prompt."""
    grader: Grader
    """Judges final answers; closed at the job's end."""
    max_new_tokens: int
    """Longest completion in tokens."""

    @property
    def prompt_id(self) -> str:
        """Id of the prompt template, as manifests and label provenance have it."""
        return self.template.prompt_id(self.policy.tokenizer)


def open_workbench(spec: JobSpec, data: JobData, *, policy: Policy | None = None) -> Workbench:
    """Load the policy and choose template, extractors and length.

    Args:
        spec: the job's settings.
        data: its rows, whose benchmark gives what the settings leave open.
        policy: an already loaded one.

    Raises:
        ConfigError, ModelError: settings or a model that cannot be used.
    """
    model = spec.model or named_model(data.rows)
    given = None if spec.template is None else get_template(spec.template)
    grader = Grader(extractors=spec.extractors or data.asking.extractors, deadline_s=spec.deadline_s)
    policy = policy or load_trained(model, dtype=spec.dtype)
    return Workbench(
        policy,
        model,
        template_for(model, data.asking.template, given),
        grader,
        spec.max_new_tokens or data.asking.max_new_tokens,
    )


def check_prompt(rows: Sequence[Mapping[str, Any]], prompt_id: str) -> None:
    """Refuse to go on under another prompt than the rows were labelled (and sampled) with, unless it was asked for.

    Raises:
        ConfigError: a row names another prompt.
    """
    for row in rows:
        earlier = (row.get("labelling") or {}).get("prompt")
        if earlier is not None and earlier != prompt_id:
            raise ConfigError(
                f"row {row.get('id', '?')!r} was labelled under another prompt template (prompt {earlier}) than the "
                f"model is asked under ({prompt_id}): give the template that it was sampled with, --template NAME"
            )


def named_model(rows: Sequence[Mapping[str, Any]]) -> str:
    """The one model that rollout rows name.

    Raises:
        ConfigError: they name none, or several.
    """
    named = sorted({str(row["model"]) for row in rows if row.get("model")})
    if len(named) == 1:
        return named[0]
    found = f"the rows name {len(named)} models ({', '.join(named[:3])})" if named else "the rows name none"
    raise ConfigError(f"give --model, whose tokenizer reads the solutions: {found}")
