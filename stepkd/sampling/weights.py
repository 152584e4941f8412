"""The policy's weights, written for vLLM servers: an adapter that is loaded beside the model, or the merged model.

Every version has a folder of its own, and every adapter a name of its own, so that nothing a server keeps for one
(prefix caches are keyed by an adapter's name and path) is taken for another.
"""

from __future__ import annotations

import copy
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from stepkd.errors import ConfigError, disk_error
from stepkd.models.policy import Policy
from stepkd.sampling.client import NO_ANSWER, START, Client, Refused


class WeightSender:
    """Writes versions of a policy's weights and has servers load them.

    A LoRA adapter as vLLM reads them goes beside the model, under a new name (0.03 to 0.3 s); anything else as the
    merged model, in place of the server's. NCCL is not used: no machine at hand could test it.

    Args:
        policy: whose weights they are.
        client: of the servers, which must see the folder under the same path.
        folder: where versions are written, in a folder of their own that goes when the process ends; None: where this
            machine keeps temporary files.
    """

    def __init__(self, policy: Policy, client: Client, folder: str | None) -> None:
        self.policy, self.client = policy, client
        self.version: Path | None = None
        """Folder of the version that servers have, whose name is the adapter's."""
        self._as_adapter = is_plain_lora(policy.model)
        self._run, self._place = uuid.uuid4().hex[:8], folder
        client.restore = lambda url: None if self.version is None else self._load(url)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """Of all versions; what processes of this machine left there that were killed goes."""
        begins = f"stepkd-weights-{socket.gethostname()}-"
        try:
            for left in Path(self._place or tempfile.gettempdir()).glob(f"{begins}*"):
                pid = left.name.removeprefix(begins).partition("-")[0]
                if pid.isdigit() and not psutil.pid_exists(int(pid)):
                    shutil.rmtree(left, ignore_errors=True)
            made = tempfile.TemporaryDirectory(prefix=f"{begins}{os.getpid()}-", dir=self._place)
            Path(made.name).chmod(0o755)  # a server may be another user's
        except OSError as error:
            place = self._place or tempfile.gettempdir()
            raise ConfigError(f"engine.weights={place}: cannot write there ({error})") from error
        return made

    def send(self, version: int) -> tuple[Path, list[str]]:
        """Write a version and have every server load it; one that is away loads it when it comes back.

        Returns:
            Its folder and the addresses that are away, for :meth:`adopt` on other ranks.

        Raises:
            ConfigError: weights that vLLM cannot take, or a server that cannot be given any.
            MachineError: a full disk, or all servers are away.
        """
        if self.version is None:
            self._check_tied()
        old, self.version = self.version, self._write(f"{self._run}-{version}")
        self.client.renew()
        self.adopt(self.version, [])
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
            for url in set(self.client.urls).difference(self.client.away) if self._as_adapter else ():
                with suppress(Refused, *NO_ANSWER):  # a server that was restarted has not got it
                    self.client.once(url, "/v1/unload_lora_adapter", {"lora_name": old.name})
        return self.version, list(self.client.away)

    def adopt(self, version: Path, away: Sequence[str]) -> None:
        """Ask for a version that the servers have, save those that are away."""
        self.version = version
        self.client.leave(away)
        if self._as_adapter:
            self.client.name = version.name

    def _write(self, name: str) -> Path:
        folder = Path(self._folder.name) / name
        try:
            if self._as_adapter:
                # Given by name: the model's own state_dict() would shard it again on this rank alone.
                state = {name: parameter.detach() for name, parameter in self.policy.model.named_parameters()}
                self.policy.model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            else:
                check_mergeable(self.policy.model)
                with _without_bar():
                    self.policy.causal_lm.save_pretrained(folder, state_dict=dict(merged_weights(self.policy.model)))
        except Exception as error:  # safetensors has its own classes
            raise disk_error(error, folder) or error from None
        return folder

    def _load(self, url: str) -> None:
        """Have one server load the version."""
        assert self.version is not None
        try:
            if self._as_adapter:
                # Not "in place": vLLM would then read the folder again for every request.
                adapter = {"lora_name": self.version.name, "lora_path": str(self.version)}
                self.client.once(url, "/v1/load_lora_adapter", adapter)
                return
            self.client.once(url, "/pause?mode=wait", {})
            try:
                weights = {"method": "reload_weights", "kwargs": {"weights_path": str(self.version)}}
                self.client.once(url, "/collective_rpc", weights)
                self.client.once(url, "/reset_prefix_cache", {})
            finally:
                self.client.once(url, "/resume", {})
        except Refused as error:
            if "already been loaded" in str(error):  # and only its answer was lost
                return
            if error.is_busy:
                raise
            lost = f"the weights in {self.version} did not reach the vLLM server at {url}"
            sees = "Does it see that folder (engine.weights is for one that both see)?"
            if error.status >= 500:  # its engine may be dying
                raise Refused(error.status, error.path, f"{lost}. {sees} {error}") from error
            raise ConfigError(f"{lost} ({error}). {sees} It is to be started with {START}") from error

    def _check_tied(self) -> None:
        """Refuse what a CPU's server gets wrong in silence: its packed copy of a tied head stays the old one."""
        ends = self.policy.causal_lm.get_input_embeddings(), self.policy.causal_lm.get_output_embeddings()
        device = self.client.info.get("device_config", {}).get("device")
        if not self._as_adapter and ends[0].weight is ends[1].weight and device == "cpu":
            raise ConfigError(
                "embeddings and vocabulary head share a weight, and a vLLM server on a CPU keeps the old head when it "
                "loads new weights: train an adapter (policy.lora), take a server on a GPU, or sample without vLLM"
            )


@contextmanager
def _without_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def is_plain_lora(model: Any) -> bool:
    """Whether a model's trained weights are one LoRA adapter of the kind that vLLM loads beside a model."""
    if not hasattr(model, "peft_config") or len(model.peft_config) != 1:
        return False
    config = model.active_peft_config
    ends = model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings()
    return (
        str(config.peft_type.value) == "LORA"
        and not (config.use_dora or config.lora_bias or config.bias != "none" or config.modules_to_save)
        and not (config.rank_pattern or config.alpha_pattern or any(hasattr(each, "base_layer") for each in ends))
    )


def check_mergeable(model: Any) -> None:
    """Refuse weights that no plain model has.

    Args:
        model: a transformers causal language model, peft-wrapped or not, whole on this rank.

    Raises:
        ConfigError: quantised weights, or an adapter on one of two tied ones.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    ends = plain.get_input_embeddings(), plain.get_output_embeddings()
    if ends[0].weight is ends[1].weight and any(hasattr(each, "base_layer") for each in ends):
        raise ConfigError(
            "embeddings and vocabulary head share a weight, and the adapter on one of them would change both in vLLM: "
            "take another target module, or sample without vLLM"
        )
    for name, _, _, parameter in _parameters(model):
        if not parameter.is_floating_point():
            raise ConfigError(
                f"{name} is quantised ({parameter.dtype}), which cannot be sent: load the policy whole "
                "(policy.quantization none), or sample without vLLM"
            )


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model that a server holds, nothing changed in place, each made when it is asked for.

    Args:
        model: as for :func:`check_mergeable`, which refuses what cannot be merged.

    Yields:
        Tied weights once, under the names of the plain model.
    """
    for name, layer, own, parameter in _parameters(model):
        if layer is not None:
            layer = copy.deepcopy(layer)
            layer.merge()
            parameter = layer.get_base_layer().get_parameter(own)
        yield name, parameter.detach()


def _parameters(model: Any) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Weights that the plain model has too: no adapter's own, and none that a trained copy stands for.

    Yields:
        Name in the plain model, the adapter layer that changes it (or None), its name in that layer, and the weight.
    """
    layers: dict[str, Any] = {}
    copies: list[str] = []
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        copies = [f".modules_to_save.{adapter}" for adapter in model.active_adapters]
    for name, parameter in model.named_parameters():
        above, _, own = name.partition(".base_layer.")
        if ".original_module." in name or (not own and any(name.startswith(f"{layer}.") for layer in layers)):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        for each in copies:
            plain = plain.replace(each, "")
        yield plain, layers.get(above), own, parameter
