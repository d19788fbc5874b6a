"""A dense model with LoRA adapters as its experts. It goes along with published models, so it imports nothing of ours
but its own files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .adapter_folders import CONFIG_NAME, FOLDER, WEIGHTS_NAME, AdapterFolder, key
from .configuration_adapter_moe import AdapterMoeConfig, AdapterMoeError
from .routed_layers import AdapterRouter, LoraExperts, RoutedLinear, add_adapters, choosing

_PUSH_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "token")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class AdapterMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """The dense model of `config.text_config`, its adapters, and the routers that choose among them.

    A folder of it has the weights of the dense model and of the routers in `model.safetensors`, and each adapter as
    PEFT keeps it, in `adapters/NAME`: PEFT loads any one of them onto the dense model.
    """

    config_class = AdapterMoeConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = [r"\.experts\.lora_[AB]$"]  # noqa: RUF012  they are in the adapters' files

    def __init__(self, config: AdapterMoeConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        add_adapters(self.language_model, config)
        if config.router_per == "model":
            self.router = AdapterRouter(config, self.get_input_embeddings().embedding_dim)
        self._no_split_modules = self.language_model._no_split_modules
        self._adapters: list[AdapterFolder] = []
        """Where the adapters were read from, and what the folders said then."""
        self._ranks: list[dict[str, int]] = []
        """Of each adapter, by the path of the linear layer."""
        self.post_init()

    @torch.no_grad()
    @init.guard_torch_init_functions()  # type: ignore[untyped-decorator]
    def initialize_weights(self) -> None:
        """Adapters that add nothing, and routers that prefer none of them, where no checkpoint has filled them.

        Transformers lets every model inside of another initialise all that is in it; the dense one does not know ours.
        """
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, LoraExperts):
                bound = module.lora_A.shape[-1] ** -0.5  # as PEFT does
                init.uniform_(module.lora_A, -bound, bound)
                init.zeros_(module.lora_B)
            elif isinstance(module, AdapterRouter) and module.scoring != "uniform":
                init.zeros_(module.weight)
            elif isinstance(module, RoutedLinear):
                init.ones_(module.adapter_scaling)

    def get_output_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """The dense model's."""
        self.language_model.set_output_embeddings(value)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """What the dense model returns, with the adapters that the routers choose for each token."""
        if self.config.router_per != "model":
            return self.language_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        choice = self.router.choose(inputs_embeds.reshape(-1, inputs_embeds.shape[-1]))
        with choosing(choice):
            return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    @contextmanager
    def taking_only(self, adapter: int) -> Iterator[None]:
        """Inside the block every router chooses one adapter, by its number, at full weight."""
        routers = [module for module in self.modules() if isinstance(module, AdapterRouter)]
        for router in routers:
            router.only = adapter
        try:
            yield
        finally:
            for router in routers:
                router.only = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every model's; adapters that are not offloaded are read into memory."""
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            config = AdapterMoeConfig.from_pretrained(config or pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = [f"{FOLDER}/{name}/*" for name in config.adapters]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **options))
        config.adapter_folders = [str(folder / FOLDER / name) for name in config.adapters]
        wants_info = kwargs.get("output_loading_info", False)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        model = loaded[0] if wants_info else loaded
        model.read_adapters()
        return loaded

    def read_adapters(self) -> None:
        """Learn how much each adapter weighs from its folder, and fill the experts that are in memory.

        Raises `AdapterMoeError` if an adapter is of a kind that cannot be mixed, or does not fit the model.
        """
        folders = self._adapters = [AdapterFolder.open(Path(folder)) for folder in self.config.adapter_folders]
        self._ranks = [folder.paths() for folder in folders]
        linears = [module for module in self.modules() if isinstance(module, RoutedLinear)]
        for folder, ranks in zip(folders, self._ranks, strict=True):
            _expect_known(folder, ranks, {linear.experts.path for linear in linears}, self.config.rank)
            _expect_own(folder, self.language_model)
        for linear in linears:
            scaling = [folder.scaling(linear.experts.path) for folder in folders]
            linear.adapter_scaling.copy_(torch.tensor(scaling))
            if "lora_A" in linear.experts._parameters:
                _fill(linear.experts, folders)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As every model's; each adapter becomes a PEFT folder. What is pushed to the Hub is saved once more for it."""
        is_pushed = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if is_pushed and name in kwargs}
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        dense = {name: value for name, value in state.items() if ".experts.lora_" not in name}
        super().save_pretrained(save_directory, *args, state_dict=dense, **kwargs)
        if kwargs.get("is_main_process", True):
            for number, name in enumerate(self.config.adapters):
                self._save_adapter(Path(save_directory) / FOLDER / name, number, state)
            if is_pushed:
                self.push_to_hub(**{"repo_id": Path(save_directory).name} | hub)

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        files_timestamps: Mapping[str, float],
        commit_message: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """All of a folder: Transformers' own (5.23) cannot upload folders within folders, as the adapters' are."""
        api = HfApi(token=token)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = commit_message or "Upload model"
        return api.upload_folder(
            repo_id=repo_id, folder_path=Path(working_dir), commit_message=message, revision=revision, **kwargs
        )

    def _save_adapter(self, target: Path, number: int, state: Mapping[str, Tensor]) -> None:
        """Write an adapter that is in memory, or copy one that is not."""
        target.mkdir(parents=True, exist_ok=True)
        source = self._adapters[number] if self._adapters else None
        is_in_memory = any(".experts.lora_" in name for name in state)
        if source is not None and not is_in_memory:
            source.expect_unchanged()
            if target.resolve() != source.folder.resolve():
                shutil.copyfile(source.weights, target / WEIGHTS_NAME)
                _write_config(target, source.config)
            return
        ranks = None if source is None else self._ranks[number]
        tensors, path_ends = {}, set()
        for name, module in self.named_modules():
            if not isinstance(module, LoraExperts) or (ranks is not None and module.path not in ranks):
                continue
            rank = self.config.rank if ranks is None else ranks[module.path]
            stacks = {matrix: state[f"{name}.lora_{matrix}"][number] for matrix in "AB"}
            tensors[key(module.path, "A")] = stacks["A"][:rank].contiguous().cpu()
            tensors[key(module.path, "B")] = stacks["B"][:, :rank].contiguous().cpu()
            path_ends.add(module.path.rpartition(".")[2])
        config = dict(source.config) if source else _peft_config(self.config.rank, sorted(path_ends))
        _replace(target / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        _write_config(target, config)


def _expect_known(folder: AdapterFolder, ranks: Mapping[str, int], paths: set[str], rank: int) -> None:
    """Nothing of an adapter may be left out in silence."""
    for path, own_rank in ranks.items():
        if path not in paths:
            raise AdapterMoeError(
                f"{folder.folder} adds to {path}, which is no routed linear layer of the model; add "
                f"{path.rpartition('.')[2]!r} to the config's target_modules"
            )
        if own_rank > rank:
            raise AdapterMoeError(
                f"{folder.folder} has rank {own_rank} at {path}, but the config says rank={rank} at most"
            )


def _expect_own(folder: AdapterFolder, dense: Any) -> None:
    """Whole weights in an adapter's file are the dense model's, whatever dtype that was loaded in."""
    weights = dict(dense.named_parameters(remove_duplicate=False))
    for name, given in folder.copies().items():
        own = weights.get(name)
        if own is not None and own.is_meta:
            continue
        if own is None or own.shape != given.shape or not torch.equal(given.to(own.device, own.dtype), own):
            raise AdapterMoeError(
                f"{folder.weights} has a {name} of its own, and a mixture has one for all adapters; train the adapter "
                f"without it, or merge it and mix dense models"
            )


def _fill(module: LoraExperts, folders: list[AdapterFolder]) -> None:
    with torch.no_grad():
        for number, folder in enumerate(folders):
            module.lora_A[number].zero_()
            module.lora_B[number].zero_()
            found = folder.read(module.path)
            if found is None:
                continue
            rank = found[0].shape[0]
            module.lora_A[number, :rank].copy_(found[0])
            module.lora_B[number, :, :rank].copy_(found[1])


def _peft_config(rank: int, targets: list[str]) -> dict[str, Any]:
    """The config of an adapter that was never a folder; its scaling is 1."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def _replace(path: Path, write: Any) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


__all__ = ["AdapterMoeForCausalLM"]
