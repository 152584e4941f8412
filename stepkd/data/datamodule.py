"""The LightningDataModule: data settings in, loaders of optimiser-step batches out."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from stepkd.data.batching import BatchPlan, Position, StepLoader
from stepkd.data.completion import Completion
from stepkd.data.config import DataConfig, Rows, as_data_config, check_training_use
from stepkd.data.encode import Encoder, LabelRule
from stepkd.data.load import load_rows
from stepkd.data.rows import Contract, Needs, Row, detect_contract, problem_with
from stepkd.data.templates import PromptTemplate, get_template, template_name
from stepkd.errors import ConfigError, DataError
from stepkd.steps.segment import get_segmenter

logger = logging.getLogger(__name__)

_WORDS = re.compile(r"\w+|[+*/=<>^%]|-(?=\s*[\d(])")
_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class StepData(LightningDataModule):
    """The rows of a run, tokenised once, in batches of one optimiser step.

    The method that is trained says what it learns from: problems with solutions (only the columns that it reads are
    required: solutions where it trains on them, answers where it grades), solutions with step labels, completions with
    an outcome, or pairs of completions.

    Args:
        train: rows to train on; evaluation-only data is refused unless the spec allows it. In Python ``train`` and its
            like may also be a list of rows, a ``datasets.Dataset`` or a path.
        validation: rows for the held-out loss and sampled accuracy.
        test: rows for ``stepkd test``.
        predict: problems for ``stepkd predict``.
        template: how a row becomes a prompt: a name (``gsm8k``, ``math``, ``plain``, ``task``), a YAML file, or
            settings; None: the one that the policy was trained with, else ``gsm8k`` (``math`` for a reward model). For
            rows with completions, that which they were sampled with.
        segmenter: how solutions are cut into steps (``newline``, ``blank_line``, ``step_heading``, ``sentence``,
            ``whole``, ``regex:PATTERN``).
        max_length: longest prompt + completion in tokens, step markers included; longer completions lose whole steps,
            and that is counted. A pair with a side that does not fit is left out.
        global_batch_size: examples per optimiser step, over all ranks.
        shuffle: shuffle the training rows each epoch.
        overlap_ngram: report how many n-grams of the validation problems occur in the training problems; 0 is off.
        seed: seed of the shuffle.
        labels: how step labels become targets, of a method that reads them; None: a reward model takes a solution up to
            its first incorrect step, KTO and Step-KTO keep all labels.
        allow_one_class: train although all labels that the method learns from agree; without it that is an error:
            nothing can be learnt.
        keep_prompts_together: shuffle prompts in place of examples, so that completions of one prompt meet in a batch
            and the prompt is read once.
        chat_kwargs: further arguments of the model's chat template, on top of those of ``template``, for instance
            ``enable_thinking: false`` for Qwen3.
    """

    def __init__(
        self,
        train: Rows | None = None,
        validation: Rows | None = None,
        test: Rows | None = None,
        predict: Rows | None = None,
        template: str | Path | PromptTemplate | None = None,
        segmenter: str = "newline",
        max_length: int = 1024,
        global_batch_size: int = 32,
        shuffle: bool = True,
        overlap_ngram: int = 8,
        seed: int = 0,
        labels: LabelRule | None = None,
        allow_one_class: bool = False,
        keep_prompts_together: bool = False,
        chat_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if overlap_ngram < 0:
            raise ConfigError(f"data.overlap_ngram={overlap_ngram}: must be 0 or positive")
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.specs = {name: as_data_config(data) for name, data in given.items()}
        self.labels = labels
        self.ratings = labels is not None and labels.kind == "rating"
        self.allow_one_class = allow_one_class
        self.keep_prompts_together = keep_prompts_together
        self.chat_kwargs = chat_kwargs or {}
        self._given_template = None if template is None else get_template(template)
        self.segmenter = get_segmenter(segmenter)
        self.max_length = max_length
        self.global_batch_size = global_batch_size
        self.shuffle = shuffle
        self.overlap_ngram = overlap_ngram
        self.seed = seed
        self.examples: dict[str, list[Completion]] = {}

    @property
    def _module(self) -> Any:
        """The module that the trainer trains; None without a trainer."""
        return getattr(self.trainer, "lightning_module", None)

    @cached_property
    def template(self) -> PromptTemplate:
        """How a row becomes a prompt; a warning says where that is not how the policy (or checkpoint) was trained."""
        trained = self._module.trained_template() if hasattr(self._module, "trained_template") else None
        default = getattr(self._module, "default_template", "gsm8k")
        used = self._given_template or trained or get_template(default)
        used = replace(used, chat_kwargs={**used.chat_kwargs, **self.chat_kwargs})
        if trained not in (None, used) and getattr(self.trainer, "global_rank", 0) == 0:
            logger.warning(
                "prompt template: data.template is %s, which this run uses; the policy was trained with %s",
                *(template_name(each) for each in (used, trained)),
            )
        return used

    def setup(self, stage: str) -> None:
        """Read, validate and tokenise the rows that a stage needs (once)."""
        if stage == "fit" and self.specs["train"] is None:
            raise ConfigError("data.train is not set: name a source, for instance data.train.source: gsm8k")
        for name in _STAGES[stage]:
            spec = self.specs[name]
            if spec is None and stage != "fit":
                raise ConfigError(f"data.{name} is not set, and `stepkd {getattr(stage, 'value', stage)}` reads it")
            if spec is not None and name not in self.examples:
                self.examples[name] = self._load(name, spec)
        if stage == "fit" and self.overlap_ngram > 0 and "validation" in self.examples:
            self._report_overlap()

    def _load(self, name: str, spec: DataConfig) -> list[Completion]:
        encoder = self._encoder(name)
        contracts = encoder.contracts
        wanted = None if contracts is not None else problem_with(self._needs(name), self._choices(name))
        rows = self._rows(name, spec, wanted)
        if contracts and (found := detect_contract(rows[0])) not in contracts:
            raise DataError(
                f"{type(self._module).__name__} learns from rows of the kinds {', '.join(c.name for c in contracts)}, "
                f"and these are of kind {found.name!r}: label or convert them first (stepkd label)",
                path=spec.path or spec.hub or spec.source,
            )
        if contracts is None and ("solution",) not in self._needs(name):
            # One without a solution, or without one that fits, can still be sampled from.
            read = [encoder.example(row) if name != "predict" and row.get("solution") else None for row in rows]
            examples = [each or encoder.prompt_example(row) for each, row in zip(read, rows, strict=True)]
        else:
            try:
                examples = encoder.examples(rows)
            except DataError as error:  # names the row by its id
                error.args = (f"data.{name}{f' ({spec.path})' if spec.path else ''}: {error}",)
                raise
        solved = any(len(each.token_ids) for each in examples)
        measured = solved or self._needs(name) or getattr(self._module, "fidelity_spec", None)
        if contracts is None and name in ("validation", "test") and not measured:
            reason = "no row has a solution and model.init_args.validation.sampling is null"
            raise DataError(f"data.{name}: nothing would be measured, because {reason}")
        facts = encoder.check(examples, training=name == "train", allow_one_class=self.allow_one_class)
        facts |= {key: count for key, count in sorted(encoder.counts.items()) if count}
        logger.info("%s: %d of %d rows%s", name, len(examples), len(rows), f", {facts}" if facts else "")
        return examples

    def _encoder(self, name: str) -> Encoder:
        """What the module that is trained makes examples of rows with; completions are sampled of problems."""
        if self._module is None:
            raise RuntimeError("StepData needs a trainer whose module has a tokenizer: attach it, or use an encoder")
        if name != "predict" and hasattr(self._module, "make_encoder"):
            encoder: Encoder = self._module.make_encoder(self)
        else:
            encoder = Encoder(self._module.tokenizer, self.template, self.segmenter, max_length=self.max_length)
        if name == "train" and encoder.labels is None and (self.labels is not None or self.allow_one_class):
            raise ConfigError(
                f"data.{'labels' if self.labels is not None else 'allow_one_class'} is set, and "
                f"{type(self._module).__name__} reads no labels: leave it out"
            )
        return encoder

    def _needs(self, name: str) -> Needs:
        return getattr(self._module, "reads", lambda split: {})(name)

    def _choices(self, name: str) -> Mapping[str, Collection[str]]:
        return getattr(self._module, "choices", lambda split: {})(name)

    def _rows(self, name: str, spec: DataConfig, contract: Contract | None = None) -> list[Row]:
        """The rows of a split; what is wrong with them, or left out of a file of one's own, is told with its name."""
        if name == "train":
            check_training_use(spec)
        try:
            rows = load_rows(spec, contract=contract, ratings=self.ratings)
        except DataError as error:
            error.args = (f"data.{name}: {error}",)
            raise
        if contract is None:  # a -1 in one split: 0 is neutral in those read after it
            self.ratings |= any("completions" in row and -1 in row["labels"] for row in rows)
        if spec.path and spec.hub:
            logger.warning("data.%s: %s is read, and hub: %s is not", name, spec.path, spec.hub)
        if spec.path and (spec.offset or len(rows) == spec.limit):
            cuts = ", ".join(f"{cut}: {getattr(spec, cut)}" for cut in ("limit", "offset") if getattr(spec, cut))
            logger.warning("data.%s: %d rows of %s are used (%s)", name, len(rows), spec.path, cuts)
        return rows

    def _report_overlap(self) -> None:
        train = (str(example.row.get("prompt")) for example in self.examples["train"])
        validation = self.examples["validation"]  # their ids need not be unique
        texts = {str(number): str(each.row.get("prompt")) for number, each in enumerate(validation)}
        shares = overlap_report(train, texts, self.overlap_ngram)
        seen = [validation[int(number)].id for number, share in shares.items() if share >= 0.5]
        logger.info(
            "train/validation overlap: of %d validation prompts %d share all of their %d-word n-grams with training "
            "prompts, %d at least half, %d at least one%s",
            len(shares),
            sum(share == 1 for share in shares.values()),
            self.overlap_ngram,
            len(seen),
            sum(share > 0 for share in shares.values()),
            f"; largely seen: {', '.join(seen[:5])}" if seen else "",
        )

    def _loader(self, name: str) -> StepLoader:
        examples, training = self.examples[name], name == "train"
        groups = None
        if training and self.keep_prompts_together:
            numbers: dict[bytes, int] = {}
            groups = [numbers.setdefault(each.prompt_ids.tobytes(), len(numbers)) for each in examples]
        plan = BatchPlan(
            [example.size for example in examples],
            size=self.global_batch_size,
            seed=self.seed,
            shuffle=training and self.shuffle,
            groups=groups,
        )
        ranks: dict[str, Any] = {}
        if self.trainer is not None:
            ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if not training:
            return StepLoader(examples, plan, **ranks)
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        position = partial(getattr, self._module, "position", Position())
        return StepLoader(examples, plan, position=position, limit=limit, **ranks)

    def fingerprint(self) -> str | None:
        """Short hash of what decides the training batches; None before the training data is loaded."""
        if "train" not in self.examples:
            return None
        plan = (self.global_batch_size, self.shuffle, self.seed)
        digest = hashlib.sha256(repr((*plan, self.keep_prompts_together)).encode())
        choices = list(self._choices("train"))
        for example in self.examples["train"]:
            digest.update(repr((example.id, getattr(example, "visits", None))).encode())
            digest.update(repr([example.row.get(name) for name in choices]).encode() if choices else b"")
            for each in example.completions:
                ids = (each.prompt_ids.tolist(), each.token_ids.tolist(), each.step_ends.tolist())
                digest.update(repr((*ids, each.outcome, each.targets, each.read_at)).encode())
        return digest.hexdigest()[:16]

    def train_dataloader(self) -> StepLoader:
        """Batches of one optimiser step, from where the run stands."""
        return self._loader("train")

    def val_dataloader(self) -> StepLoader | list[Any]:
        """Validation batches in file order; none without validation data."""
        return self._loader("validation") if "validation" in self.examples else []

    def test_dataloader(self) -> StepLoader:
        """Test batches in file order."""
        return self._loader("test")

    def predict_dataloader(self) -> StepLoader:
        """Problems to sample completions for, in file order."""
        return self._loader("predict")


def overlap_report(train_texts: Iterable[str], test_texts: Mapping[str, str], n: int = 8) -> dict[str, float]:
    """Measure how much of the test texts stands in the training texts, by word n-grams.

    Texts are compared as words in lower case, without punctuation and spacing; arithmetic operators count as words. A
    text of fewer than ``n`` words is compared as a whole.

    Args:
        train_texts: read once, may be a generator of any length.
        test_texts: by id; their n-grams are held in memory.
        n: words per n-gram, at least 1; 8 to 13 are usual for contamination checks.

    Returns:
        By id the share of a test text's distinct n-grams that stand in some training text, in [0, 1].

    Raises:
        ConfigError: ``n`` below 1.
    """
    if n < 1:
        raise ConfigError(f"n={n}: must be at least 1")
    grams = {name: _grams(text, n) for name, text in test_texts.items()}
    wanted = set().union(*grams.values())
    seen: set[tuple[str, ...]] = set()
    for text in train_texts:
        seen |= wanted & _grams(text, n)
    return {name: len(own & seen) / max(len(own), 1) for name, own in grams.items()}


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold())
    return {tuple(words[start : start + n]) for start in range(max(len(words) - n + 1, min(len(words), 1)))}
