"""Train `tiny-moe`: a stock Qwen3MoeForCausalLM of 16 experts, from scratch on the three domains.

python train_moe.py --work DIR     # needs DIR/tokens; writes tiny-moe/ beside this file
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from cpu_kernels import ATTENTION, with_fast_experts
from train_tokenizer import CONTEXT, VOCAB_SIZE
from training import TrainingConfig, train
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).resolve().parent
SHARD_BYTES = 6_000_000


def tiny_moe_config() -> Qwen3MoeConfig:
    """8 sparse layers of 16 experts, 4 per token: 8.7 M parameters, 3.4 M of them at work for a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        hidden_act="silu",
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        attention_bias=False,
        attention_dropout=0.0,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        use_sliding_window=False,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def save(model: Qwen3MoeForCausalLM, tokenizer: Path, target: Path) -> None:
    """Write a bf16 copy in the original per-expert layout, several shards, with tokenizer and generation defaults."""
    copy = Qwen3MoeForCausalLM(tiny_moe_config()).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.8, top_p=0.95
    )
    shutil.rmtree(target, ignore_errors=True)
    copy.save_pretrained(target, max_shard_size=SHARD_BYTES)
    for file in tokenizer.iterdir():
        shutil.copy(file, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder of corpus.py and train_tokenizer.py")
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: one per core")
    parser.add_argument("--out", type=Path, default=HERE, help="where model and curve go; default: beside this file")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    config = TrainingConfig(
        steps=arguments.steps, learning_rate=arguments.learning_rate, balance_weight=0.02, evaluate_every=200
    )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(config.seed)
    model = with_fast_experts(Qwen3MoeForCausalLM(tiny_moe_config()))
    model.set_attn_implementation(ATTENTION)
    tokenizer, checkpoint = work / "tokenizer", work / "checkpoints" / "tiny-moe"
    facts = train(model, config, work, out / "curve-tiny-moe.csv", lambda m: save(m, tokenizer, checkpoint))
    save(model, tokenizer, out / "tiny-moe")
    (out / "tiny-moe-training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
