"""Models small enough for Triton's interpreter, and their answers."""

import torch
from transformers import AutoModelForCausalLM, CompileConfig

from transformers_moe_offload import OffloadConfig
from zoo.build import zoo_model
from zoo.weights import randomise

SMALL = {
    "qwen3_moe": {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "num_hidden_layers": 2},
    "gpt_oss": {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_local_experts": 4,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""What is changed of the zoo's tiny configurations: the interpreter takes a tenth of a second for a layer of these.
Two programs for each of an expert's matrices."""

NEW_TOKENS = 4


def save(name, folder, **fields):
    """A random model of that architecture, written to a folder."""
    entry = zoo_model(name)
    for field, value in (SMALL[name] | fields).items():
        setattr(entry.config, field, value)
    entry.config.vocab_size = 96
    model = entry.model_class._from_config(entry.config, experts_implementation="eager")
    randomise(model, 0)
    model.eval().save_pretrained(folder)


def load(folder, decode="host", budget="50%", device="cpu", **options):
    """The model, offloaded; on a CPU its experts are copied into slots, as on a GPU."""
    config = OffloadConfig(decode=decode, cache_budget=budget, mmap=False, **options)
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=config, device_map=device)


def prompt(batch=1, length=20, seed=0):
    """Random tokens, more than decode on the device takes."""
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **options):
    """Tokens and logits of a greedy generation: (batch, length), (steps, batch, vocabulary)."""
    ids = ids.to(model.device)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        | options,
    )
    return found.sequences, torch.stack(found.logits)


def static(backend="eager", *, fullgraph=False, **options):
    """What has `generate` ask the model for its compiled call, on a CPU as well; backend "eager" leaves it as it is."""
    everywhere = CompileConfig(backend=backend, fullgraph=fullgraph)
    if backend != "eager":
        everywhere.mode = None
    everywhere._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": everywhere, **options}


class Pieces:
    """A backend of `torch.compile` that computes what it is given as it is, and keeps count of it."""

    def __init__(self):
        self.sizes = []
        """Of each piece that was compiled, calls in it."""
        self.num_runs = 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, piece, inputs, **options):
        self.sizes.append(sum(node.op == "call_function" for node in piece.graph.nodes))

        def run(*given):
            self.num_runs += 1
            return piece.forward(*given)

        return run
