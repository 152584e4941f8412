"""A step label's way: one class with arrays from the row to the label, and again to the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepkd.data.collate import Batch, collate
from stepkd.data.completion import Completion
from stepkd.data.config import DataConfig, parse_spec
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.data.load import load_rows
from stepkd.labels import job as labelling
from stepkd.labels.labellers import Solution, StepLabels
from stepkd.labels.monte_carlo import MonteCarloLabeller
from stepkd.labels.settings import LabelConfig
from stepkd.labels.solutions import SampledSolutions
from stepkd.losses import LossTerms
from stepkd.models.policy import Policy
from stepkd.models.spec import LabelTokens, PolicyConfig
from stepkd.modules.prm import PRMModule
from stepkd.sampling.config import Transformers


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What every station of the way takes and gives, in the order of the stations."""
    found: dict[str, list[Any]] = {}

    def watch(owner: Any, name: str, station: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            given = original(*args, **options)
            found.setdefault(station, []).extend(given if isinstance(given, list) else [given])
            taken = args[-1] if station == "labeller" else [args[:2] if station == "row" else args[0]]
            found.setdefault(f"{station} takes", []).extend(taken)
            return given

        monkeypatch.setattr(owner, name, watched)

    watch(SampledSolutions, "solutions", "source")
    watch(labelling, "cut", "steps")
    watch(MonteCarloLabeller, "label", "labeller")
    watch(labelling, "labelled_row", "row")
    return found


def test_a_label_travels_with_the_same_objects_and_arrays(
    spec: LabelConfig, run: Any, met: dict[str, list[Any]], policy: Policy
) -> None:
    """Row, completion, labels, row, completion, batch, loss terms: no other class holds a solution."""
    run(replace(spec, engine=Transformers(8)))
    assert {type(each) for each in met["source"]} == {type(each) for each in met["steps"]} == {Solution}
    assert issubclass(Solution, Completion)
    assert {type(each) for each in met["labeller"]} == {StepLabels}
    for drawn, taken, whole, labelled, labels, (written, its_labels), row in zip(
        *(met["source"], met["steps takes"], met["steps"], met["labeller takes"], met["labeller"]),
        *(met["row takes"], met["row"]),
        strict=True,
    ):
        assert taken is drawn, "a drawn solution is cut itself"
        assert labelled is whole, "a cut one is labelled itself"
        assert written is whole
        assert its_labels is labels, "and its labels are written as they were said"
        assert isinstance(drawn.token_ids, np.ndarray)
        assert whole.token_ids is drawn.token_ids, "the array itself"
        assert whole.prompt_ids is drawn.prompt_ids
        assert (row["token_ids"], row["step_ends"]) == (drawn.token_ids.tolist(), whole.step_ends.tolist())
        assert (row["step_labels"], row["steps"]) == (list(labels.labels), list(whole.steps))
    rows = load_rows(parse_spec(str(Path(spec.out))))
    assert rows == met["row"], "the file holds the rows themselves"
    data = StepData(
        DataConfig(path=str(Path(spec.out) / "labels.jsonl")),
        template="task",
        max_length=96,
        overlap_ngram=0,
        global_batch_size=len(rows),
        labels=LabelRule(after_error="keep"),
        allow_one_class=True,
    )
    module = PRMModule(PolicyConfig(path="tiny-0.1m", dtype="float64"), LabelTokens())
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module, global_rank=0, world_size=1, limit_train_batches=1.0
    )
    data.setup("fit")
    module.configure_model()
    examples = data.examples["train"]
    assert {type(part) for example in examples for part in example.completions} == {Completion}
    for example in examples:
        (part,) = example.completions
        read = iter(part.token_ids.tolist())
        sampled = next(row["token_ids"] for row in rows if row["id"] == example.id)
        missing = {token for token in sampled if token not in read}
        assert missing <= policy.eos_ids, "the sampled ids, in order, with markers between them and no end token"
    batch = collate(examples, pad_id=0)
    assert type(batch) is Batch
    assert all(mine is given for mine, given in zip(batch.examples, examples, strict=True))
    parts = [part for example in examples for part in example.completions]
    ids = zip(batch.input_ids_BT, batch.attention_mask_BT.bool(), strict=True)
    assert [row[mask].tolist() for row, mask in ids] == [[*p.prompt_ids.tolist(), *p.token_ids.tolist()] for p in parts]
    assert batch.targets_LC.tolist() == [list(each) for part in parts for each in part.targets if each is not None]
    scored = [int(part.token_ids[at]) for part in parts for at in part.read_at]
    assert batch.input_ids_BT.flatten()[batch.read_L].tolist() == scored, "every label is read at its step's marker"
    assert type(module.loss_terms(batch)) is LossTerms
