"""Silence notices of libraries that say nothing the progress display does not, or that do not apply here."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Turn down notices of Lightning, and progress bars of transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning.pytorch  # noqa: F401 (importing it sets the levels that are lowered here)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # reports that were asked for
    logging.getLogger("lightning").handlers.clear()  # it would repeat what the root logger prints
    for text in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Using ModelCheckpoint with manual optimization.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*`is_gradient_checkpointing` is deprecated.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        r".*self\.log\('(val|test)/.*sync_dist=True.*",  # ours are reduced over ranks before they are logged
    ):
        warnings.filterwarnings("ignore", text)
