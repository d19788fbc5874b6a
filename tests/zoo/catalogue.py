"""What single architectures need beyond the table in `shrink.py`: configuration fields, and which class to build.

An architecture that is absent here builds from the table alone. Every entry is there because without it the model would
not build, not run, not be tiny, or have too few sparse layers.
"""

from .inputs import embeddings, prompt_and_canvas, text_and_images, text_and_typed_images

CLASS_ENDINGS = ("ForConditionalGeneration", "ForCausalLM", "ForBlockDiffusion", "ForTokenClassification", "Model")
"""Which class of a directory to build, best first: everything it has, then a language head, then whatever there is."""

VARIANTS = {
    # The composite of the two has no forward of its own.
    "qwen3_omni_moe": ("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen3_omni_moe_talker": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerForConditionalGeneration"),
    # Llama 4 in images and text fails in Transformers 5.24, and its experts are like no other's.
    "llama4_text": ("llama4", "Llama4ForCausalLM"),
}
"""Models whose class is not the most complete one of the directory that bears their name: (directory, class)."""

SINCE = {"hy_v4_vl": "5.24", "inkling2_loop": "5.24", "lara_mini": "5.24", "sarvam_mla": "5.24", "sarvam_moe": "5.24"}
"""The version of Transformers in which an architecture appeared, where that is not the oldest that we work with."""

INPUTS = {
    "diffusion_gemma": prompt_and_canvas,
    "dots3_note": text_and_images,
    "ernie4_5_vl_moe": text_and_typed_images,
    "qwen3_omni_moe_talker": embeddings,
}
"""Models that need more than token ids, or have experts that would stay idle on token ids alone."""

OVERRIDES = {
    "bailing_hybrid": {"layer_group_size": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
    # The last channels feed an encoder of the tower's width.
    "deepseek_ocr2": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    "diffusion_gemma": {
        "canvas_length": 8,
        "text_config": {"global_head_dim": 16},
        "vision_config": {"position_embedding_size": 16},
    },
    "dots3_note": {
        "text_config": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 16,
        },
        # A pyramid: the second sparse layer of the vision tower has twice the experts of the first.
        "vision_config": {
            "num_hidden_layers": 3,
            "adapter_in_dim": 32,
            "pyramid_num_routed": [-1, 4, 8],
        },
        "audio_config": {"adapter_input_size": 32},
    },
    # Text experts and vision experts of different widths live side by side in every layer.
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [96, 48],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        }
    },
    "gemma4": {
        "text_config": {"enable_moe_block": True, "global_head_dim": 16},
        "vision_config": {"position_embedding_size": 16},
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_kpool": 2}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v4_vl": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        }
    },
    "inkling": {"vision_config": {"patch_size": 2, "num_hidden_layers": 4}},
    # Six layers, of which the third and the fourth run three times in every forward.
    "inkling2_loop": {
        "text_config": {
            "num_hidden_layers": 6,
            "n_layers_per_attn_res_block": 2,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_gate_rank": 16,
        }
    },
    "jamba": {"attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 16], "depths": [1, 1], "patch_sizes": [4, 2]}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "nllb_moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 32}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        }
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 64]}}},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields for `shrink.tiny`, by model; nested as the configurations are."""
