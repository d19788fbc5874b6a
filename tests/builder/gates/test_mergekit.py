"""Gates of mergekit-moe 0.1.5, to the last bit.

Its formulas are written down here once more, plainly; mergekit itself is run where the environment variable
MERGEKIT_MOE names its command. It is LGPL, and lives in an environment of its own:

    python -m venv mk; mk/bin/pip install torch==2.13.0; mk/bin/pip install mergekit==0.1.5 transformers==5.23.0
    MERGEKIT_MOE=mk/bin/mergekit-moe pytest tests/builder/gates/test_mergekit.py
"""

import os
import subprocess

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense import dense_model
from transformers_moe_offload.builder.gates import program_gates
from transformers_moe_offload.builder.recipe import Dataset, Expert, Gate, Origin
from transformers_moe_offload.builder.sources import open_source
from transformers_moe_offload.errors import RecipeError

MERGEKIT = os.environ.get("MERGEKIT_MOE")
MODES = {
    "hidden": "hidden",
    "hidden_avg": "hidden_avg",
    "cheap_embed": "cheap_embed",
    "random": "random",
    "uniform": "uniform_random",
}
PROMPTS = (
    ("import os\n\ndef main():", "class Reader:\n    def __init__(self, path):\n        self.path = path"),
    ("#ifndef _LINUX_QUEUE_H", "struct list { int length; };", "static inline int"),
)
NEGATIVE = ("The following arguments are used", "See also")


def experts():
    return [
        Expert(name="python", positive_prompts=PROMPTS[0]),
        Expert(name="c", positive_prompts=PROMPTS[1], negative_prompts=NEGATIVE),
    ]


def formula(mode, folder, tokenizer, layers, seed):
    """The formulas in a few lines: (L, E, H)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hidden_size = model.config.hidden_size
    torch.manual_seed(seed)
    if mode == "random":
        return torch.randn(layers, 2, hidden_size)
    if mode == "uniform":
        return torch.rand(layers, 2, hidden_size) * 2 * (1 / hidden_size) ** 0.5 - (1 / hidden_size) ** 0.5
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.bos_token

    def vector(prompts):
        batch = tokenizer(
            [tokenizer.bos_token + p for p in prompts], return_tensors="pt", padding=True, add_special_tokens=False
        )
        if mode == "cheap_embed":
            embedded = model.get_input_embeddings().weight.float()[batch["input_ids"]]
            total = (embedded * batch["attention_mask"][..., None]).sum(1).sum(0)
            return (total / total.norm().clamp(min=1e-8)).expand(layers, -1)
        with torch.no_grad():
            hidden = torch.stack(model(**batch, output_hidden_states=True).hidden_states[:layers])
        pooled = hidden.sum(2) / hidden.shape[2] if mode == "hidden_avg" else hidden[:, :, -1]
        return pooled.sum(1) / pooled.shape[1]

    rows = [vector(PROMPTS[0]), vector(PROMPTS[1]) - vector(NEGATIVE)]
    return torch.stack([row / row.norm(dim=-1, keepdim=True).clamp(min=1e-8) for row in rows], 1)


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_the_formulas_to_the_last_bit(mode, base, ffn, tiny_dense):
    gate = Gate(mode=mode, scoring="mergekit", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    gates = program_gates(gate, experts(), base, tokenizer, ffn, advance=lambda layers: None)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|pad|>"), "the tokenizer was changed"

    expected = formula(mode, tiny_dense, tokenizer, len(ffn), seed=3)

    assert len(gates.rows) == len(expected)
    for layer, rows in gates.rows.items():
        assert torch.equal(rows, expected[layer].float()), f"layer {layer}"


@pytest.mark.skipif(MERGEKIT is None, reason="set MERGEKIT_MOE to the command mergekit-moe of version 0.1.5")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_rows_are_what_mergekit_writes(mode, family, tokenizer, tmp_path):
    folders = [tmp_path / name for name in ("base", "first", "second")]
    for seed, folder in enumerate(folders):
        fields = {"vocab_size": 4096, "num_hidden_layers": 3} | (
            {"sliding_window": None} if family == "mistral" else {}
        )
        dense_model(family, torch.bfloat16, seed, **fields).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    recipe = {
        "base_model": str(folders[0]), "gate_mode": MODES[mode], "dtype": "bfloat16",
        "experts": [
            {"source_model": str(folders[1]), "positive_prompts": list(PROMPTS[0])},
            {"source_model": str(folders[2]), "positive_prompts": list(PROMPTS[1]), "negative_prompts": list(NEGATIVE)},
        ],
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    subprocess.run([MERGEKIT, tmp_path / "recipe.yml", out, "--random-seed", "3"], check=True, capture_output=True)
    written = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}

    gate = Gate(mode=mode, scoring="mergekit", seed=3)
    ffn = {layer: f"model.layers.{layer}.mlp" for layer in range(3)}
    source = open_source(Origin(model=str(folders[0])))
    gates = program_gates(gate, experts(), source, tokenizer, ffn, advance=lambda layers: None)

    for layer, rows in gates.rows.items():
        assert torch.equal(rows.bfloat16(), written[f"model.layers.{layer}.mlp.gate.weight"]), f"layer {layer}"


def test_what_mergekit_does_not_do_is_refused(base, tokenizer, ffn):
    def program(experts=experts(), **fields):  # noqa: B008
        return program_gates(Gate(scoring="mergekit", **fields), experts, base, tokenizer, ffn)

    with pytest.raises(RecipeError, match=r"does not go with gate.mode='ridge', which mergekit lacks"):
        program()
    with pytest.raises(RecipeError, match=r"does not go with gate.scale=2.0"):
        program(mode="hidden", scale=2.0)
    with pytest.raises(RecipeError, match="'b' has no positive_prompts"):
        program([*experts(), Expert(name="b")], mode="hidden")
    with pytest.raises(RecipeError, match="'b' has a dataset, which mergekit cannot read"):
        program([*experts(), Expert(name="b", positive_prompts=("a",), dataset=Dataset(path="a.txt"))], mode="hidden")
    with pytest.raises(RecipeError, match="all 2 experts have the same prompts"):
        program([Expert(name=name, positive_prompts=("same",)) for name in "ab"], mode="hidden")
