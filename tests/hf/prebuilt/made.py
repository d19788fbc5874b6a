"""Contents of a prebuilt checkpoint that are made up: the writer does not know what a record means."""

import torch

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hf.prebuilt.layout import LayerContent
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.output.shards import Content
from transformers_moe_offload.store.record import RecordLayout

FIELDS = (FieldSpec("down_proj.codes", (50, 96), "uint8"), FieldSpec("down_proj.scale", (50, 3), "float16"))
HOT_FIELDS = (FieldSpec("down_proj.codes", (100, 96), "uint8"), FieldSpec("down_proj.scale", (50, 3), "float16"))
HOT_LAYER, HOT_EXPERTS = 2, frozenset({0, 3})
RECIPE = {"version": 1, "source": {"name": "made-up"}, "experts": {"default": {"nbits": 4}}, "dense": None}
NUM_EXPERTS = 5


def values(seed: int, spec: FieldSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype(spec.dtype)).view(spec.shape)


def record(layer: int, expert: int) -> torch.Tensor:
    layout = RecordLayout(HOT_FIELDS if layer == HOT_LAYER and expert in HOT_EXPERTS else FIELDS)
    made = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for spec, view in zip(layout.fields, layout.views(made).values(), strict=True):
        view.copy_(values(1000 * layer + expert, spec))
    return made


def layer(number: int, read=record) -> LayerContent:
    hot = (HOT_EXPERTS, HOT_FIELDS) if number == HOT_LAYER else ()
    return LayerContent(f"model.layers.{number}.mlp.experts", NUM_EXPERTS, FIELDS, lambda e: read(number, e), *hot)


def dense(number: int) -> Content:
    """A quantized linear layer: tensors of several dtypes, some of an odd size."""
    specs = (
        FieldSpec(f"model.layers.{number}.o_proj.weight_codes", (3, 7), "uint8"),
        FieldSpec(f"model.layers.{number}.o_proj.weight_scale", (3, 1), "float16"),
        FieldSpec(f"model.layers.{number}.norm.weight", (5,), "float32"),
    )
    return Content(specs, lambda: {spec.name: values(number, spec) for spec in specs})


def prebuilt(num_layers: int = 3, read=record) -> Prebuilt:
    layers = [layer(number, read) for number in range(num_layers)]
    return Prebuilt(layers, [dense(number) for number in range(num_layers)], {"config.json": "{}\n"})


def write(folder, content: Prebuilt | None = None, recipe=RECIPE, **options) -> None:
    write_prebuilt(folder, content or prebuilt(), recipe, advance=lambda nbytes: None, **{"workers": 2} | options)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
