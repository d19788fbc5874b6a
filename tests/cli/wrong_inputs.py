"""Inputs that each subcommand has to refuse, and the folder that they are typed in."""

import json
import os
import shutil
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1}
CONFIG |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4096}

CASES = [
    ("plan dense", "LlamaForCausalLM has no routed experts that can be offloaded"),
    ("plan moe --cache-budget 1", "set --cache-budget to 110,592 bytes or more"),
    ("plan moe --cache-budget 25", "error: a cache budget of 25 bytes is too small: one slot for an expert takes "),
    ("plan moe --experts 4x48", "--experts '4x48' is not a format: a group size is one of 16, 32, 64, 128"),
    ("plan moe --experts 5x32", "--experts '5x32' is not a format: the number of bits is one of 8, 4, 3, 2, 1"),
    ("plan moe --experts 4", "--experts '4' is not a format; write bits and group size such as 4x64"),
    ("plan moe --dense 4", "--dense '4' is not a format"),
    ("plan moe --lm-head 4", "--lm-head '4' is not a format"),
    ("plan moe --layers 0-3=4", "--layers '0-3=4': '4' is not a format"),
    ("plan moe --layers 9=4x32", "--layers names sparse layer '9', but the model has 8"),
    ("plan moe --layers x=4x32", "--layers has 'x', which is not a layer's number"),
    ("plan nowhere", "error: there is no folder 'nowhere' here, and no model of that name can be read from the Hub: "),
    ("plan moe --layers 3", "--layers '3' names no format"),
    ("plan text.txt", "it is a file; name the folder that a model was saved to, or an id of the Hub"),
    ("plan odd", "its config is not valid: "),
    ("chat moe --prompt", "requires an argument"),
    ("chat empty --prompt x", "the folder has no config.json; name one that a model was saved to"),
    ("chat moe --prompt x --policy clairvoyant", "--policy 'clairvoyant' is not a known policy; choose one of ["),
    ("chat moe --prompt x --cache-aware -1", "strength=-1.0 of cache_aware is not a number from 0"),
    ("bench moe --cache-aware 2", "strength=2.0 of cache_aware is not a number from 0"),
    ("quantize moe out", "nothing to quantize; say how: --experts 4x64"),
    ("quantize moe moe/out --experts 4x32", "DST moe/out and SRC moe lie inside one another"),
    ("quantize hollow out --experts 4x32", "has experts without weights: by the config, gate_up_proj of each is of"),
    ("quantize moe full --experts 4x32", "full is not empty"),
    ("convert moe out --from mixtral-offloading", "the layout of mixtral-offloading is for Mixtral, but "),
    ("convert moe out --from elsewhere", "Invalid value for '--from': 'elsewhere' is not"),
    ("build nowhere.yaml out", "cannot read nowhere.yaml: No such file or directory"),
    ("build text.txt out", "text.txt holds a str, not a mapping"),
    ("build blank.yaml out", "blank.yaml is empty; see the documentation"),
    ("bake moe out", "moe is a qwen3_moe; only a mixture of adapters (adapter_moe) is baked"),
    ("bake odd out", "cannot read the config of odd: "),
    ("push moe me/moe", "moe is not a complete prebuilt checkpoint: it has no moe_offload.safetensors.index.json"),
    ("push nowhere me/moe", "there is no folder nowhere"),
    ("bench", "bench measures a MODEL or, with --kernels, products of matrices: give one of the two"),
    ("bench moe --json nowhere/figures.json", "it is in nowhere, which is not a folder"),
    ("bench moe --json /dev/null", "cannot write --json /dev/null: it is a device or a pipe; name a file"),
    ("bench moe --prefetch clairvoyant", "--prefetch 'clairvoyant' is not a known predictor; choose one of ["),
    ("bench moe --text nowhere", "cannot read --text nowhere: No such file or directory"),
    ("trace moe -o t.npz", "give prompts either with --prompt, as often as you like, or as the lines of --prompts"),
    ("trace moe -o t.npz --prompts nowhere", "error: cannot read --prompts nowhere: No such file or directory"),
    ("trace moe -o t.npz --prompt caf\udce9", "--prompt is not valid UTF-8 after 3 characters"),
    ("chat moe --prompt caf\udce9", "the prompt is not valid UTF-8 after 3 characters"),
    ("trace moe -o full --prompt x", "cannot write --output full: it is a folder"),
    ("trace moe -o t.npz --prompt x --seed x", "--seed"),
    ("trace moe -o t.npz --prompt x --routing full", "full has other files, 'notes.txt' among them"),
    ("replay text.txt", "cannot read the trace text.txt: it is not an .npz archive"),
    ("replay full", "/full: it has no trace.json"),
    ("replay moe", "it is the folder of a model; record a trace of it with `moe-offload trace`"),
    ("replay text.txt --json nowhere/counts.json", "it is in nowhere, which is not a folder"),
    ("replay nowhere.npz", "error: cannot read the trace nowhere.npz: No such file or directory"),
    ("report text.txt -o plots", "cannot read the trace text.txt: it is not an .npz archive"),
    ("report full -o plots", "/full: it has no trace.json"),
    ("tradeoff moe", "--text"),
    ("tune moe", "--ram"),
    ("tune moe --ram 1GiB", "give what to tune for either with --text FILE"),
    ("tune moe --ram 1GiB --text nowhere", "cannot read --text nowhere: No such file or directory"),
    ("tune moe --ram x --text text.txt", "'x'"),
    ("tradeoff moe --text nowhere", "cannot read --text nowhere: No such file or directory"),
    ("tradeoff moe --text blank.yaml", "--text blank.yaml has 0 tokens, and nothing to predict in fewer than 2"),
    ("tradeoff moe --text text.txt --strengths x", "--strengths 'x' is not a list of numbers"),
    ("tradeoff moe --text text.txt --strengths 3", "strength=3.0 of cache_aware is not a number from 0"),
    ("tradeoff moe --text text.txt --picture p.pdf", "is neither .svg nor .png"),
    ("tradeoff moe --text text.txt --resume text.txt", "text.txt is not valid JSON"),
    ("tune moe", "--ram"),
    (
        "tune moe --ram 4MiB",
        "give what to tune for either with --text FILE, as often as you like, or with --trace TRACE",
    ),
    ("tune moe --ram 4MiB --text text.txt --trace text.txt", "give what to tune for either with --text FILE"),
    ("tune moe --ram 4MiB --text nowhere", "cannot read --text nowhere: No such file or directory"),
    ("tune moe --ram 4MiB --text blank.yaml", "--text blank.yaml has 0 tokens, and nothing to predict in fewer than 2"),
    ("tune moe --ram 4MiB --trace text.txt", "cannot read the trace text.txt: it is not an .npz archive"),
    ("tune moe --ram 40% --text text.txt", "--ram '40%' is not a size; write bytes as an int, or a size such as"),
    ("tune moe --ram 1 --text text.txt", "one slot for an expert takes"),
    ("tune moe --ram 4MiB --text text.txt --strengths -1", "strength=-1.0 of cache_aware is not a number from 0"),
    ("tune dense --ram 4MiB --text text.txt", "has no routed experts that can be offloaded"),
    ("tune full --ram 4MiB --text text.txt", "full' is neither a folder with a model nor one that can be read"),
    *((f"{command} {'n' * 300} out", "File name too long") for command in ("bake", "push")),
]


def fill(folder: Path) -> None:
    """Put a model into it, and what is none."""
    (folder / "moe").symlink_to(EXAMPLES / "models" / "tiny-moe", target_is_directory=True)
    for name, config in (("dense", CONFIG), ("odd", CONFIG | {"hidden_size": "wide"})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "moe", folder / "hollow", copy_function=os.symlink)
    (folder / "hollow" / "config.json").unlink()
    hollow = json.loads((folder / "moe" / "config.json").read_text()) | {"moe_intermediate_size": 0}
    (folder / "hollow" / "config.json").write_text(json.dumps(hollow))
    for name in ("empty", "full"):
        (folder / name).mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "blank.yaml").write_text("")
    (folder / "text.txt").write_text("no trace, no recipe\n")


def expect_refusal(exit_code: int, said: str, message: str) -> None:
    """One line on stderr that says this."""
    assert exit_code == 2, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if "─ Error ─" in said:  # Typer's, of what is typed
        assert lines == []
        assert message in said
    else:
        assert len(lines) == 1, said
        assert message in lines[0]
