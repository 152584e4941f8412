"""What jobs that label or make pairs work with: rows, the policy with its prompt template, a grader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from stepkd.data.config import parse_spec, resolve_split
from stepkd.data.io import fingerprint
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM, check_unique_ids, detect_contract
from stepkd.data.sources import asking
from stepkd.data.templates import get_template
from stepkd.errors import ConfigError, DataError
from stepkd.grading.extract import EXTRACTOR_VERSION
from stepkd.grading.pool import Grader
from stepkd.labels.labellers import Need, Row
from stepkd.labels.settings import LabelJobConfig
from stepkd.models.checkpoint import load_trained, tokenizer_fingerprint, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.source import template_for
from stepkd.runs.job import Job, package_versions
from stepkd.sampling.dtype import settled_dtype
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.scorers.load import pick_device
from stepkd.tasks.rows import is_task_row


class Workbench:
    """What every job works with.

    Args:
        config: the job's settings.
        word: the rows in one word: file, folder or data settings.
        model: the policy; None: the one that the rows name.
        needs: what every row must have.
        problems: whether the word names problems, not solutions.
        job: keeps a dtype that is measured.
        policy: an already loaded one.

    Raises:
        ConfigError, DataError, ModelError: settings, rows or a model that cannot be used.
    """

    def __init__(
        self,
        config: LabelJobConfig,
        word: str,
        model: str | None,
        needs: Sequence[Need],
        *,
        problems: bool,
        job: Job,
        policy: Policy | None = None,
    ) -> None:
        self.config = config
        self.data = data = parse_spec(word)
        self.rows = load_rows(data, contract=PROBLEM if problems else None)
        """Problems, or solutions; their ids are unique."""
        place = data.path or data.source
        if not problems:
            _check_solutions(self.rows, place)
        check_unique_ids(self.rows, path=place)
        for row in self.rows:
            for names, lacks in needs:
                if all(row.get(name) is None for name in names):
                    raise DataError(f"row {str(row['id'])!r} {lacks}", path=place, column=names[0])
        self.device = pick_device(config.device)  # an impossible one is refused before the model is loaded
        self.benchmark = asking(data.source, is_task=all(map(is_task_row, self.rows)))
        """What the data's prompts, answers and longest completion are like where the settings do not say."""
        self.model = model or _named_model(self.rows)
        template = None if config.template is None else get_template(config.template)
        self.dtype: str | None = config.dtype
        if policy is not None and config.dtype == "auto":
            raise ConfigError("dtype=auto is measured for a model that the job loads, and this one was given: drop it")
        if policy is None:
            self.dtype = settled_dtype(config.dtype, self.model, config.engine, self.device, job, "model.dtype")
            policy = load_trained(self.model, dtype=self.dtype, weights=config.engine.holds_weights)
        self.policy = policy
        """Samples, continues and tokenises; still on the CPU."""
        self.template = template_for(self.model, self.benchmark.template, template)
        self.grader = Grader(config.grading, extractors=self.benchmark.extractors)
        """Judges final answers; closed at the job's end."""
        self._engine: dict[str, Any] = {"name": type(config.engine).__name__}

    def engine(self) -> Engine:
        """What samples from the policy; see :meth:`~stepkd.sampling.config.EngineConfig.for_job`."""
        engine = self.config.engine.for_job(self.policy, self.device)
        self._engine |= engine.facts()
        return engine

    @property
    def prompt_id(self) -> str:
        """Id of the prompt template, as settings and label provenance have it."""
        return self.template.prompt_id(self.policy.tokenizer)

    @property
    def source(self) -> str:
        """Data source and split, as settings and label provenance have them; no paths."""
        return f"{self.data.source}:{resolve_split(self.data)}"

    def limited(self, sampling: SamplingConfig) -> SamplingConfig:
        """The same with the benchmark's longest completion where it has none."""
        return replace(sampling, max_new_tokens=sampling.max_new_tokens or self.benchmark.max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """What decides the result of any job, for its ``settings.json``."""
        policy, grading = self.policy, self.config.grading
        return {
            "model": {
                "name": self.model,
                "revision": None if policy.spec is None else policy.spec.revision,
                "weights": weights_fingerprint(policy),
                "tokenizer": tokenizer_fingerprint(policy.tokenizer),
                "end_ids": sorted(policy.eos_ids),
                "attention": policy.causal_lm.config._attn_implementation,
                "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
            },
            "data": {
                "source": self.source,
                "rows": len(self.rows),
                "fingerprint": fingerprint(self.rows),
                "options": dict(self.data.options),
            },
            "prompt": self.prompt_id,
            "template": asdict(self.template),
            "extractor": EXTRACTOR_VERSION,
            "extractors": list(self.grader.extractors),
            **grading.decides(),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "engine": self._engine,
            "batch_size": self.config.engine.at_once,
            "versions": package_versions(),
        }

    def check_prompt(self) -> None:
        """Refuse another prompt than the rows were labelled (and sampled) with, unless it was asked for.

        Raises:
            ConfigError: a row names another prompt.
        """
        for row in [] if self.config.template is not None else self.rows:
            earlier = (row.get("labelling") or {}).get("prompt")
            if earlier is not None and earlier != self.prompt_id:
                raise ConfigError(
                    f"row {row.get('id', '?')!r} was labelled under another prompt template (prompt {earlier}) than "
                    f"the model is asked under ({self.prompt_id}): give the template that it was sampled with, "
                    "--template NAME"
                )


def _check_solutions(rows: Sequence[Row], place: str) -> None:
    contract = detect_contract(rows[0])
    if contract.name.endswith("preference"):
        raise DataError(f"{contract.name} rows hold no single solution to label", path=place)
    for row in rows if contract is PROBLEM else []:
        if row.get("solution") is None:
            raise DataError(
                f"row {row['id']!r} is a problem without a solution: have solutions of it Sampled",
                path=place,
                column="solution",
            )


def _named_model(rows: Sequence[Row]) -> str:
    """The one model that completion rows name.

    Raises:
        ConfigError: they name none, or several.
    """
    named = sorted({str(row["model"]) for row in rows if row.get("model")})
    if len(named) == 1:
        return named[0]
    found = f"the rows name {len(named)} models ({', '.join(named[:3])})" if named else "the rows name none"
    raise ConfigError(
        f"give the model whose tokenizer reads the solutions (--solutions.model; of `stepkd pairs`: --model): {found}"
    )


def pair_record(
    identity: str,
    index: int,
    rows: Sequence[dict[str, Any]] = (),
    *,
    dropped: Mapping[str, int] | None = None,
    facts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The record of one item of a pair job; reasons with a count of 0 are left out.

    Args:
        identity: id of the item, unique over the job.
        index: its number.
        rows: its preference rows, perhaps none.
        dropped: number of pairs (or of the whole item) left out, by reason.
        facts: whole numbers to be added up over the job (tokens generated, continuations drawn, ...); none for an item
            that was left out before anything was drawn.
    """
    reasons = {reason: count for reason, count in (dropped or {}).items() if count}
    return {"id": identity, "index": index, "rows": list(rows), "dropped": reasons, "facts": dict(facts or {})}
