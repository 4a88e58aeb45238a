"""config.json of published models, as their pages have it: what of it decides the model. Written by hand."""

NEMOTRON_H = {"model_type": "nemotron_h", "vocab_size": 131072, "num_key_value_heads": 8, "ssm_state_size": 128,
              "mamba_num_heads": 128, "n_groups": 8, "conv_kernel": 4, "mlp_hidden_act": "relu2", "use_conv_bias": True,
              "layer_norm_epsilon": 1e-5, "time_step_min": 0.001, "tie_word_embeddings": False, "head_dim": 128}
JAMBA_LAYERS = {"num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2,
                "expert_layer_offset": 1}
CONFIGS = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": True},
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "hidden_act": "silu"},
    "olmoe-1b-7b": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"},
    "mamba2-2.7b": {
        "model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80,
        "head_dim": 64, "state_size": 128, "n_groups": 1, "expand": 2, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "bamba-9b": {
        "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "attn_layer_indices": [9, 18, 27],
        "attn_rotary_emb": 64, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
        "mamba_d_conv": 4, "mamba_expand": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144,
        "tie_word_embeddings": False, "hidden_act": "silu"},
    "granite-4.0-h-tiny": {
        "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512,
        "num_hidden_layers": 40, "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64,
        "num_experts_per_tok": 6, "shared_intermediate_size": 1024, "mamba_n_heads": 48, "mamba_d_head": 64,
        "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
        "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        "position_embedding_type": "nope", "attention_multiplier": 0.0078125, "embedding_multiplier": 12,
        "logits_scaling": 6, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "tie_word_embeddings": True, "hidden_act": "silu"},
    "nemotron-h-8b": {
        **NEMOTRON_H, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32, "mamba_head_dim": 64,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "num_hidden_layers": 52,
        "max_position_embeddings": 8192},
    "nemotron-nano-9b-v2": {
        **NEMOTRON_H, "hidden_size": 4480, "intermediate_size": 15680, "num_attention_heads": 40, "mamba_head_dim": 80,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "num_hidden_layers": 56,
        "max_position_embeddings": 131072},
    "bitnet-2b-4t": {
        "model_type": "bitnet", "vocab_size": 128256, "hidden_size": 2560, "intermediate_size": 6912,
        "num_hidden_layers": 30, "num_attention_heads": 20, "num_key_value_heads": 5, "hidden_act": "relu2",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                "quantization_mode": "online"}},
    "falcon-h1-0.5b": {
        "model_type": "falcon_h1", "vocab_size": 32784, "hidden_size": 1024, "intermediate_size": 2048,
        "num_hidden_layers": 36, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_rms_norm": False, "mamba_norm_before_gate": False,
        "rms_norm_eps": 1e-5, "rope_theta": 1e11, "max_position_embeddings": 16384, "tie_word_embeddings": False,
        "embedding_multiplier": 5.656854249492381, "lm_head_multiplier": 0.0390625,
        "key_multiplier": 0.39062499999999994, "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375,
        "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587,
        "mlp_multipliers": [0.8838834764831844, 0.5859375],
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "hidden_act": "silu"},
    "lfm2-1.2b": {
        "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 12288,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3,
        "conv_bias": False, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "norm_eps": 1e-5, "rope_theta": 1000000.0,
        "max_position_embeddings": 128000, "tie_word_embeddings": True},
    "jamba-v0.1": {
        "model_type": "jamba", "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 14336, **JAMBA_LAYERS,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 2,
        "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256, "mamba_conv_bias": True,
        "mamba_proj_bias": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144,
        "tie_word_embeddings": False, "hidden_act": "silu"},
    "zamba2-2.7b": {
        "model_type": "zamba2", "vocab_size": 32000, "hidden_size": 2560, "num_hidden_layers": 54, "mamba_d_state": 64,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 80, "intermediate_size": 10240,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_mem_blocks": 2, "adapter_rank": 128,
        "use_shared_attention_adapter": False, "use_mem_rope": False, "add_bias_linear": False, "hidden_act": "gelu",
        "layers_block_type": ["hybrid" if i in (6, 12, 18, 24, 30, 36, 42, 47, 51) else "mamba" for i in range(54)],
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": True},
}
