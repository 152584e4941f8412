"""A Lightning logger for Trackio, which Lightning has none for."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger
from typing_extensions import override


class TrackioLogger(Logger):
    """Logs to Trackio, on this machine unless ``TRACKIO_SPACE_ID`` names a Space; a resumed run continues its own.

    Args:
        project: Trackio's project.
        name: of the run; None: under ``stepkd fit`` the name of the run folder, else one of Trackio's.
        save_dir: where its database goes, in a folder ``trackio``; None: the run folder. Trackio looks for its place
            once in a process, and the variable ``TRACKIO_DIR`` wins: ``TRACKIO_DIR=FOLDER trackio show`` opens it.

    Raises:
        ModuleNotFoundError: Trackio is not installed.
    """

    def __init__(self, project: str = "stepkd", name: str | None = None, save_dir: str | Path | None = None) -> None:
        super().__init__()
        self._project, self._name, self._save_dir = project, name, save_dir
        self._run: Any = None
        if save_dir is not None:
            os.environ.setdefault("TRACKIO_DIR", str(Path(save_dir).absolute() / "trackio"))
        import trackio  # noqa: F401 - which looks for its place

    @property
    @override
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    @override
    def version(self) -> str | None:
        """The run."""
        return self._name

    @property
    @override
    def save_dir(self) -> str | None:
        """Where its folder ``trackio`` lies; None: where Trackio puts it."""
        return None if self._save_dir is None else str(self._save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, begun when it is first asked for."""
        if self._run is None:
            import trackio

            self._run = trackio.init(self._project, self._name, resume="allow", embed=False)
            self._name = self._run.name  # whatever is logged after the end goes to the same run
        return self._run

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep settings for the run; Trackio stores them with the first metrics."""
        self.experiment.config.update(_convert_params(params))

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers by name."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        """Log rows as a table, as Lightning's logger for W&B does."""
        import trackio

        self.experiment.log({key: trackio.Table(columns=columns, data=data)}, step=step)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left; what is logged after it goes to the same run."""
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None
