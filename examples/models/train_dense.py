"""Train `tiny-dense`: a stock LlamaForCausalLM, from scratch on the three domains.

python train_dense.py --work DIR   # needs DIR/tokens; writes tiny-dense/ beside this file
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from cpu_kernels import ATTENTION
from train_tokenizer import CONTEXT, VOCAB_SIZE
from training import TrainingConfig, train
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent


def tiny_dense_config() -> LlamaConfig:
    """6 layers, 3.1 M parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        hidden_act="silu",
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def save(model: LlamaForCausalLM, tokenizer: Path, target: Path) -> None:
    """Write a bf16 copy with tokenizer and generation defaults."""
    copy = LlamaForCausalLM(tiny_dense_config()).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.8, top_p=0.95
    )
    shutil.rmtree(target, ignore_errors=True)
    copy.save_pretrained(target)
    for file in tokenizer.iterdir():
        shutil.copy(file, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder of corpus.py and train_tokenizer.py")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: one per core")
    parser.add_argument("--out", type=Path, default=HERE, help="where model and curve go; default: beside this file")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    config = TrainingConfig(steps=arguments.steps, learning_rate=arguments.learning_rate)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(tiny_dense_config())
    model.set_attn_implementation(ATTENTION)
    tokenizer, checkpoint = work / "tokenizer", work / "checkpoints" / "tiny-dense"
    facts = train(model, config, work, out / "curve-tiny-dense.csv", lambda m: save(m, tokenizer, checkpoint))
    save(model, tokenizer, out / "tiny-dense")
    (out / "tiny-dense-training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
