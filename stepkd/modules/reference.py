"""The reference model of preference training: where it comes from, and a cache of its log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepkd.data.collate import Completion
from stepkd.data.encode import completion_key
from stepkd.errors import ConfigError, ModelError
from stepkd.models import Policy
from stepkd.models.checkpoint import load_trained, parameters_fingerprint
from stepkd.rollout.annotate import check_same_vocabulary
from stepkd.runs.files import write_file


@dataclass(frozen=True)
class ReferenceSpec:
    """The frozen model that log-ratios are taken against."""

    path: str | None = None
    """Another model of the same vocabulary: run folder, model folder, hub id; null: the policy as it starts. That is
    its adapter-off view when fresh adapters are trained, and a frozen copy otherwise."""
    cache: bool = False
    """Compute all the reference's log-probabilities once, before the first step, keep them in the run folder and let go
    of its weights: no second model in memory, and nothing is computed again in a second epoch."""


def attach_reference(policy: Policy, spec: ReferenceSpec) -> None:
    """Give a policy its reference, while its weights are still those it starts from.

    Raises:
        ModelError: the reference cannot be loaded, or has another vocabulary.
    """
    if spec.path is not None:
        dtype = policy.spec.dtype if policy.spec is not None and policy.spec.dtype != "auto" else None
        reference = load_trained(spec.path, dtype=dtype)
        check_same_vocabulary(policy.tokenizer, reference.tokenizer)
        policy.set_reference(reference)
    elif policy.spec is None or policy.spec.lora is None:
        policy.freeze_copy()  # all weights are trained, or an adapter that is no longer at its start


def reference_identity(policy: Policy) -> str:
    """Fingerprint of the reference's weights."""
    with policy.reference() as view:
        assert isinstance(view, Policy)
        named = view.named_parameters()
        return parameters_fingerprint(named if view is not policy else [(n, p) for n, p in named if "lora_" not in n])


class ReferenceCache:
    """Log-probabilities of completions under the reference, keyed by prompt and completion ids.

    Args:
        folder: where the ranks' files are; read at once.
        identity: fingerprint of the reference; files of another one are refused.
        precision: the Trainer's; what was computed in another one is not taken, and has to be computed again.

    Raises:
        ModelError: a file of another reference, or one that cannot be read.
    """

    def __init__(self, folder: str | Path, identity: str, precision: str = "32-true") -> None:
        self.folder = Path(folder)
        self.identity = identity
        self.precision = precision
        self._logps: dict[bytes, Tensor] = {}
        for path in sorted(self.folder.glob("reference-*.safetensors")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._logps)

    @staticmethod
    def _key(completion: Completion) -> bytes:
        return completion_key(completion.prompt_ids, completion.ids)

    def __contains__(self, completion: Completion) -> bool:
        return self._key(completion) in self._logps

    def get(self, completion: Completion) -> Tensor:
        """Log-probability of every token of a completion, on the CPU.

        Raises:
            ConfigError: it was never computed: the data is not what the cache was made for.
        """
        found = self._logps.get(self._key(completion))
        if found is None:
            raise ConfigError(
                "reference.cache holds no log-probabilities of a completion of this batch, and the reference's weights "
                "are gone: resume with the data and batch size that the run was begun with, or set reference.cache: "
                "false"
            )
        return found

    def add(self, completions: Sequence[Completion], logps: Iterable[Tensor]) -> None:
        """Keep log-probabilities, one tensor per completion."""
        for completion, values in zip(completions, logps, strict=True):
            if len(values) != len(completion.ids):
                raise ValueError(f"{len(values)} log-probabilities for {len(completion.ids)} tokens")
            self._logps[self._key(completion)] = values.detach().cpu()

    def save(self, rank: int = 0) -> None:
        """Write everything this rank knows, whole or not at all."""
        if not self._logps:
            return
        path = self.folder / f"reference-{rank}.safetensors"
        values = list(self._logps.values())
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self._logps)), dtype=torch.uint8).view(-1, 16).clone(),
            "lengths": torch.tensor([len(each) for each in values]),
            "logps": torch.cat(values),
        }
        facts = {"reference": self.identity, "precision": self.precision}
        write_file(path, lambda temporary: save_file(tensors, temporary, metadata=facts))

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                keys, lengths, logps = (file.get_tensor(name) for name in ("keys", "lengths", "logps"))
        except Exception as error:  # safetensors raises its own class for a torn or foreign file
            raise ModelError(f"{path} is not a readable reference cache ({type(error).__name__}): delete it") from error
        if facts.get("reference") != self.identity:
            raise ModelError(
                f"{path} was made with another reference model ({facts.get('reference')} there, {self.identity} here): "
                "delete it, or give the reference of the first run"
            )
        if facts.get("precision", "32-true") != self.precision:
            return
        for key, values in zip(keys, logps.split(lengths.tolist()), strict=True):
            self._logps[bytes(key.tolist())] = values.clone()
