"""Metrics as JSON Lines that survive resuming: ``metrics.jsonl`` is only ever appended to.

Lightning's ``CSVLogger`` deletes the earlier lines when a run is resumed. Here each start of the run gets a number
(``run``), and a reader takes the newest value of each metric at each step (:func:`read_metrics`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import IO, Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from typing_extensions import override

from stepkd.errors import ConfigError, DataError, disk_error

METRICS_FILE = "metrics.jsonl"

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class JsonlLogger(Logger):
    """Lightning logger that appends one line per logging call to ``metrics.jsonl`` in the run folder.

    A line holds ``run`` (1 for the first start, one more per resume), ``step``, ``seconds`` (wall
    time since this start), then the metrics (Lightning adds ``epoch``). NaN and infinities are written as the
    strings "NaN", "Infinity", "-Infinity". Each line is flushed; only rank 0 writes.

    Args:
        folder: the run folder; made on the first write.
    """

    name = version = ""
    """Empty, so that checkpoints go to ``<folder>/checkpoints``."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._path = self._folder / METRICS_FILE
        self._stream: IO[bytes] | None = None
        self._run = 0
        self._start = time.monotonic()

    @property
    @override
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line.

        Args:
            metrics: names to numbers (or one-element tensors).
            step: what Lightning counts (batches that stepped) or the module logs as ``step``; -1 is written for None.

        Raises:
            MachineError: the line could not be written (disk full, folder gone); no part of it is left.
        """
        try:
            if self._stream is None:
                self._stream = self._open()
            seconds = round(time.monotonic() - self._start, 3)
            line: dict[str, Any] = {"run": self._run, "step": -1 if step is None else int(step), "seconds": seconds}
            line |= {name: _plain(value) for name, value in metrics.items() if name not in line}
            append(self._stream, json.dumps(line) + "\n")
        except OSError as error:
            raise disk_error(error, self._path, "The lines before are intact. ") or error from None

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` holds the settings."""

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later call of :meth:`log_metrics` opens it again within the same ``run``."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> IO[bytes]:
        stream = open_to_append(self._path)
        if not self._run:
            self._run = 1 + max((line["run"] for line in _lines(self._path)), default=0)
        return stream


for _logger in (CSVLogger, TensorBoardLogger):
    if signature(_logger).parameters["save_dir"].default is Parameter.empty:  # a recipe need not name the run's folder
        _logger.__init__.__defaults__ = (None, *_logger.__init__.__defaults__)  # type: ignore[misc]


_PACKAGES = {
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "TrackioLogger": "trackio",
}


def place_loggers(settings: Any, folder: Path) -> None:
    """Give loggers that are told no folder the run's, and the run's name to those that have a place for one.

    Args:
        settings: of one logger or several, as parsed; changed in place.
        folder: the run folder.

    Raises:
        ConfigError: a logger's package is missing, or MLflow is not allowed to write files.
    """
    for logger in settings if isinstance(settings, list) else [settings]:
        options = getattr(logger, "init_args", None) or {}
        kind = str(getattr(logger, "class_path", "")).rpartition(".")[2]
        if kind in _PACKAGES and find_spec(_PACKAGES[kind]) is None:
            raise ConfigError(f"trainer.logger: {kind} needs {_PACKAGES[kind]}: pip install 'stepkd[loggers]'")
        if kind == "MLFlowLogger" and not (options["tracking_uri"] or os.environ.get("MLFLOW_ALLOW_FILE_STORE")):
            raise ConfigError(
                "trainer.logger: MLflow writes files under MLFLOW_ALLOW_FILE_STORE=true only: set that variable, or "
                "name a server in MLFLOW_TRACKING_URI"
            )
        named = "name" if kind in ("WandbLogger", "TrackioLogger") else "run_name"
        place = folder / "mlruns" if kind == "MLFlowLogger" else folder
        for name, value in {"save_dir": str(place), "root_dir": str(folder), named: folder.name}.items():
            if name in options and options[name] in (None, ".", "./mlruns"):  # the classes' own defaults
                options[name] = (
                    str(folder / "mlruns") if options[name] == "./mlruns" else value
                )  # MLflow reads all of it


def log_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Give a logger a table, if it has a place for one: any with a ``log_table`` as that for W&B has it, MLflow (one
    file, to which every table is appended), TensorBoard (as text).

    Args:
        logger: of any kind; rank 0 only.
        name: of the table, for instance ``val/samples``.
        columns: their names.
        rows: values in the order of ``columns``.
        step: that of the metrics which belong to it.
    """
    if isinstance(logger, MLFlowLogger):
        table = {"step": [step] * len(rows)} | {column: [row[i] for row in rows] for i, column in enumerate(columns)}
        logger.experiment.log_table(str(logger.run_id), table, f"{name}.json")
    elif isinstance(logger, TensorBoardLogger):
        cells = [[escape(str(cell)).replace("|", "&#124;").replace("\n", "<br>") for cell in row] for row in rows]
        lines = [list(columns), ["---"] * len(columns), *cells]
        logger.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    elif hasattr(logger, "log_table"):
        logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a run's metrics as one row per step.

    Args:
        path: ``metrics.jsonl`` or the run folder that holds it.

    Returns:
        Rows in order of ``step``. Lines of one step are merged. What an earlier start of the run logged at steps that
        a later one did again is left out. ``run`` is that of the newest line.

    Raises:
        DataError: there is no such file, or a line that no crash explains is broken.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"there are no metrics here; a training run writes {METRICS_FILE} into its --out", path=path)
    rows: dict[int, dict[str, Any]] = {}
    run = 0
    for line in _lines(path):
        if run and line["run"] > run:  # it was resumed before that step
            rows = {step: row for step, row in rows.items() if step < line["step"]}
        run = line["run"]
        rows.setdefault(line["step"], {}).update(line)
    return [rows[step] for step in sorted(rows)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines; the last one may be torn, or be written just now."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
                assert isinstance(line["run"], int)
                assert isinstance(line["step"], int)
            except (ValueError, TypeError, KeyError, AssertionError):
                raise DataError(
                    "this line is not a metrics record; was the file edited? Remove the line", path=path, line=number
                ) from None
            yield {name: float(value) if value in _NOT_FINITE else value for name, value in line.items()}


def _plain(value: Any) -> Any:
    """A number as JSON holds it; what is not finite becomes its name."""
    return json.loads(json.dumps(value, default=lambda tensor: tensor.item()), parse_constant=str)


def open_to_append(path: Path) -> IO[bytes]:
    """A file for :func:`append`, made where it is missing; a line without an end is taken off, as a process leaves it
    that dies while it writes.

    Raises:
        OSError: it cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by the caller
    stream.seek(0)
    stream.truncate(stream.read().rfind(b"\n") + 1)
    return stream


def append(stream: IO[bytes], text: str) -> None:
    """Add text to an unbuffered file, whole or not at all.

    Raises:
        OSError: it could not be written; the file is what it was.
    """
    data, end = memoryview(text.encode()), stream.seek(0, 2)
    try:
        while data:
            data = data[stream.write(data) :]
    except OSError:
        stream.truncate(end)
        raise
