"""`quantize_checkpoint`: from a model in a folder or on the Hub to a checkpoint with quantized experts.

The model is never built: experts are read, encoded and written one by one. `source.py` reads them, `writer.py` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from transformers_moe_offload.config import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.loading.meta_model import MetaModel, meta_model
from transformers_moe_offload.hf.prebuilt.card import auto_class_of, model_card
from transformers_moe_offload.hf.prebuilt.layout import MARKS, LayerContent, plain_config, prebuilt_config
from transformers_moe_offload.hf.prebuilt.publish import publish
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization, contents
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.hub.fetch import Fetched
from transformers_moe_offload.hub.upload import expect_pushable
from transformers_moe_offload.output.place import expect_place
from transformers_moe_offload.output.shards import Advance, Content
from transformers_moe_offload.tensor_files.checksum import fingerprint
from transformers_moe_offload.tensor_files.writer import as_json
from transformers_moe_offload.untrusted import quoted

ContentsOf = Callable[[Quantization, Fetched], tuple[Sequence[LayerContent], Sequence[Content]]]
"""From a checkpoint's files: the sparse layers and the dense tensors to write."""


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A checkpoint that was written."""

    folder: Path
    sizes: Sizes
    """Bytes before and after."""
    url: str | None
    """Where it is on the Hub, if it was uploaded."""


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    *,
    experts: HqqFormat | ExpertFormats | Mapping[str, Any] | None = None,
    dense: HqqFormat | Mapping[str, Any] | None = None,
    lm_head: HqqFormat | Mapping[str, Any] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    push: str | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    revision: str = "main",
    token: str | None = None,
    local_files_only: bool = False,
    advance: Advance | None = None,
) -> QuantizedCheckpoint:
    """Quantize the experts of a model with HQQ, one by one, into a checkpoint that loads like any other.

    It takes the memory of one expert a worker, however large the model is. A call that was killed resumes when it is
    made again: until the last file is written the folder does not load.

        from transformers_moe_offload import HqqFormat, quantize_checkpoint

        four_bits = HqqFormat(nbits=4, group_size=64)
        made = quantize_checkpoint("Qwen/Qwen3-30B-A3B", "qwen3-4bit", experts=four_bits)
        print(made.sizes.plain_bytes, "->", made.sizes.nbytes)

    Args:
        model: a folder with a checkpoint, or the id of a model on the Hub; not quantized, or in FP8, MXFP8 or MXFP4.
        output: the folder to write: a new or an empty one, or one that an interrupted call with the same arguments has
            left.
        experts: how to quantize the routed experts: an `HqqFormat` for all, an `ExpertFormats` for different formats by
            layer, or for those that a trace saw most (`Trace.hottest`), a dictionary of the fields of either, or None.
        dense: how to quantize attention and dense MLPs; None leaves them as they are.
        lm_head: how to quantize the output embedding, if its matrix is not the input embedding's, too; None leaves it
            as it is.
        workers: experts that are encoded at a time; None means one per core.
        overwrite: replace a complete checkpoint that is there, once the new one is complete.
        push: upload it to this repository of the Hub when it is done.
        private: whether a new repository is private; None means the account's default.
        base_model: the Hub's id of a model that is read from a folder, for the model card.
        revision: branch, tag or commit of the model, as in `from_pretrained`.
        token: as in `from_pretrained`.
        local_files_only: as in `from_pretrained`.
        advance: called with the number of bytes just written; without it there is a progress bar.

    Returns:
        The folder, and its sizes.

    Raises:
        ConfigError: for a format that does not fit the model, or a model that is quantized already.
        UnsupportedModelError: for a model without routed experts.
        CheckpointError: for a model that cannot be read, and an `output` that holds anything else.
        UploadError: if the Hub refuses the upload. The folder stays.
    """
    config = OffloadConfig(experts=experts, dense=dense, lm_head=lm_head)  # type: ignore[arg-type]
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ConfigError(f"workers={quoted(workers)} is not a positive number of experts; leave it out")
    folder = Path(output)
    expect_place(folder, MARKS, overwrite=overwrite, model=model)
    source = meta_model(str(model), revision=revision, token=token, local_files_only=local_files_only)
    plan = QuantizationPlan.of(source, config)
    prepared = plan.prepare(folder, overwrite=overwrite, repo=push, base_model=base_model)
    prepared.write(workers=workers, advance=advance)
    url = publish(folder, push, private=private, token=token) if push is not None else None
    return QuantizedCheckpoint(folder=folder, sizes=plan.sizes, url=url)


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """A checkpoint to write. Formats and sizes are known; no weight has been read, or downloaded."""

    source: MetaModel
    config: OffloadConfig
    quantization: Quantization
    sizes: Sizes

    @classmethod
    def of(cls, source: MetaModel, config: OffloadConfig) -> QuantizationPlan:
        """How to quantize a model as a config says; raises as `quantize_checkpoint` does."""
        if not config.is_quantizing:
            four_bits = "HqqFormat(nbits=4, group_size=64)"
            raise ConfigError(f"nothing to quantize; say how: experts={four_bits} or dense={four_bits}")
        if source.recipe is not None:
            raise ConfigError(f"{source.name!r} is quantized already; quantize the model that it was made from")
        quantization = Quantization.of(source.model, config, source.dtype, source.opener)
        if any(layer.layout.has_own_files for layer in quantization.layers):
            raise UnsupportedModelError(
                f"the experts of {source.name!r} are adapters in files of their own, which are written in no other "
                f"format; quantize them while loading, with OffloadConfig(experts=...), or make blocks of them with "
                f"`moe-offload bake` and quantize those"
            )
        tensors = source.quantized_tensors()
        stored = None if tensors is None else quantization.stored_bytes(tensors)
        return cls(source=source, config=config, quantization=quantization, sizes=Sizes.of(quantization, stored))

    def prepare(
        self,
        folder: Path,
        *,
        fetched: Fetched | None = None,
        contents_of: ContentsOf = contents,
        overwrite: bool = False,
        repo: str | None = None,
        base_model: str | None = None,
    ) -> PreparedCheckpoint:
        """Download the weights; make config, model card and recipe. `overwrite` and `base_model` are those of
        `quantize_checkpoint`.

        `contents_of` encodes the weights of the `fetched` files; None downloads them. `repo` is where the caller will
        upload the checkpoint: the name on the model card, and an error if that cannot be.
        """
        expect_place(folder, MARKS, overwrite=overwrite, model=self.source.name)
        if repo is not None:
            expect_pushable(HfApi(token=self.source.hub_options["token"]), repo)
        fetched = fetched or self.source.fetch()
        dtype = dtype_name(self.source.dtype)
        recipe = recipe_of(fetched.name, fetched.revision, fetched.weights, dtype, self.config)
        plain = plain_config(self.source.model, self.source.dtype)
        card = model_card(
            repo or folder.resolve().name,
            fetched,
            self.config,
            self.sizes,
            base_model=base_model,
            auto_class=auto_class_of(self.source.model),
            left_as=self.quantization.left_as,
            dense_left_as=self.quantization.dense_left_as,
        )
        texts = {"config.json": as_json(prebuilt_config(plain, self.config.recipe())), "README.md": card}
        content = Prebuilt(*contents_of(self.quantization, fetched), texts=texts, copies=fetched.companions)
        return PreparedCheckpoint(folder=folder, content=content, recipe=recipe, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class PreparedCheckpoint:
    """A checkpoint to write, whose source is on this machine."""

    folder: Path
    content: Prebuilt
    recipe: Mapping[str, Any]
    overwrite: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.nbytes for shard in self.content.shards())

    def write(self, *, workers: int | None = None, advance: Advance | None = None) -> None:
        """Encode and write it; the arguments are those of `quantize_checkpoint`."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers already use all cores
        try:
            write_prebuilt(
                self.folder, self.content, self.recipe, overwrite=self.overwrite, workers=workers, advance=advance
            )
        finally:
            torch.set_num_threads(before)


def recipe_of(
    name: str, revision: str | None, files: Sequence[Path], dtype: str, config: OffloadConfig
) -> dict[str, Any]:
    """The recipe, from the files of the plain checkpoint; contains no paths of this machine."""
    return {
        "source": {
            "name": name,
            "revision": revision,
            "dtype": dtype,
            "files": {file.name: fingerprint(file) for file in files},
        },
        **config.recipe(),
    }
