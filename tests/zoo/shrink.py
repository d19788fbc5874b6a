"""Make a configuration of any architecture tiny, from the fields its configuration class declares.

One table of field names serves all architectures; `catalogue.py` lists what a single architecture needs on top. No two
axes of an expert are equally long (eight experts, hidden 64, intermediate 96, gate and up together 192), so that a
transposed or swapped axis cannot pass unnoticed.
"""

import dataclasses

from transformers import AutoConfig, PreTrainedConfig

VOCAB_SIZE = 128
NUM_TEXT_TOKENS = 96
"""Random prompts draw from the ids below this one; those above stand for images, padding, end of text and so on."""

_SIZES = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input",
    NUM_TEXT_TOKENS + 16: "unpadded_vocab_size",
    96: "intermediate_size intermediate_size_mlp dense_intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim mlp_dim"
    " output_proj_dims moe_intermediate_size expert_ffn_hidden_size ffn_hidden_size",
    64: "hidden_size d_model text_hidden_size out_hidden_size adapter_out_dim output_dim thinker_hidden_size"
    " vision_output_dim projector_input_dim projector_output_dim projector_hidden_size projection_intermediate_size"
    " projection_hidden_dim",
    32: "moe_hidden_size share_expert_dim shared_intermediate_size shared_expert_intermediate_size"
    " shared_experts_intermediate_size moe_shared_expert_intermediate_size hidden_size_per_layer_input"
    " q_lora_rank o_lora_rank router_hidden_size"
    " ssm_state_size mamba_d_state mamba_chunk_size chunk_size hc_lowrank mel_vocab_size n_mel_bins num_mel_bins"
    " output_channels",
    16: "head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim"
    " d_kv kv_channels kv_lora_rank index_head_dim block_size num_position_embeddings downsample_hidden_size",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim"
    " sliding_window sliding_window_size attention_chunk_size mamba_n_heads mamba_num_heads",
    4: "num_hidden_layers num_layers n_layers num_decoder_layers encoder_layers decoder_layers"
    " num_attention_heads num_heads n_heads swa_num_attention_heads encoder_attention_heads"
    " decoder_attention_heads linear_num_heads linear_num_value_heads n_group zero_expert_num index_topk"
    " index_topk_blocks",
    2: "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts topk_group num_key_value_heads"
    " swa_num_key_value_heads kv_n_heads linear_num_key_heads n_groups o_groups index_n_heads",
    1: "first_k_dense_replace num_dense_layers moe_layer_start_index n_shared_experts num_shared_experts"
    " moe_num_shared_experts",
}
TINY = {field: size for size, fields in _SIZES.items() for field in fields.split()}
"""The size of every field we shrink, in every configuration class that declares it.

Four layers are one dense layer, where the architecture has such, and three sparse ones.
"""

ALWAYS = {
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "top_k_experts",
    "moe_intermediate_size",
    "n_shared_experts",
}
"""Set even where the class leaves them at None. Elsewhere None usually switches a part of the architecture off."""

TINY_TOWER = {
    "num_hidden_layers": 2,
    "depth": 2,
    "encoder_layers": 2,
    "hidden_size": 32,
    "d_model": 32,
    "image_size": 64,
}
"""Vision, audio and speech towers are there to be loaded and saved; two narrow layers are enough."""

TOWERS = ("vision", "audio", "sam", "encoder", "code2wav")


def tiny(config_class: type, overrides: dict | None = None, *, is_tower: bool = False) -> PreTrainedConfig:
    """An instance of `config_class` with few of everything.

    overrides: fields to set whatever the table says; a dict under the name of a sub-configuration goes to that one.
    """
    overrides = dict(overrides or {})
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    sizes = TINY | TINY_TOWER if is_tower else TINY
    values = {
        name: sizes[name] for name in declared if name in sizes and (declared[name] is not None or name in ALWAYS)
    }
    if "mlp_layer_types" in declared:
        values["mlp_layer_types"] = ["dense"] + ["sparse"] * (values["num_hidden_layers"] - 1)
    if "kv_lora_rank" in declared:  # multi-head latent attention has as many key heads as query heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, sub_class in config_class.sub_configs.items():
        if sub_class is AutoConfig:
            sub_class = type(getattr(config_class(), name))
        values[name] = tiny(sub_class, overrides.pop(name, None), is_tower=is_tower or name.startswith(TOWERS))
    return config_class(**(values | _special_tokens(declared) | overrides))


def _special_tokens(declared: dict) -> dict[str, int]:
    """Distinct ids above the text for every special token, in place of ids beyond the tiny vocabulary."""
    names = [name for name in declared if name.endswith(("_token_id", "_token_index")) and declared[name] is not None]
    return {name: VOCAB_SIZE - 1 - position for position, name in enumerate(sorted(names))}
