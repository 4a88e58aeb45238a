"""What others call the options of a spec: config.json of Hugging Face's models, the usual trainers. Loads no torch."""

#: a foreign name -> ours
FOREIGN: dict[str, str] = {
    theirs: ours
    for ours, foreign in {
        "context_length": ("max_position_embeddings n_positions n_ctx max_seq_len max_seq_length seq_len seq_length "
                           "max_sequence_length model_max_length block_size context context_window context_size "
                           "sequence_length"),
        "hidden_size": "d_model n_embd dim hidden_dim embed_dim embedding_size embedding_dim model_dim n_embed width",
        "vocab_size": "n_vocab vocab vocabulary_size padded_vocab_size num_embeddings",
        "layers": "num_hidden_layers n_layers n_layer num_layers depth",
        "tied_embeddings": "tie_word_embeddings tie_embeddings tie_embedding_weights weight_tying share_embeddings",
        "name": "model_name model_type _name_or_path architectures",
        "heads": "num_attention_heads n_heads n_head num_heads attention_heads nheads",
        "kv_heads": "num_key_value_heads n_kv_heads n_kv_head num_kv_heads multi_query_group_num",
        "head_dim": "d_head head_size attention_head_dim headdim d_kv",
        "rope_base": "rope_theta rotary_base rotary_emb_base theta rope_freq_base",
        "bias": "qkv_bias attention_bias attn_bias mlp_bias use_bias add_qkv_bias use_qkv_bias add_bias_linear",
        "out_bias": "attention_out_bias",
        "embedding_multiplier": "scale_emb",
        "logits_multiplier": "lm_head_multiplier",
        "logits_softcap": "final_logit_softcapping",
        "multiplier": "residual_multiplier",
        "rope_scaling": "rope_factor rope_type rope_parameters",
        "rotary_fraction": "partial_rotary_factor rotary_pct rotary_percent",
        "window": "sliding_window window_size attention_window sliding_window_size",
        "softcap": "attn_logit_softcapping",
        "scale": "attention_multiplier",
        "qk_norm": "use_qk_norm qk_layernorm q_norm k_norm",
        "inner_size": "intermediate_size moe_intermediate_size ffn_dim d_ff n_inner ffn_hidden_size "
                      "feed_forward_dim mlp_dim ffn_size inner_dim expert_size ffn_inner_size",
        "shared_inner_size": "shared_expert_intermediate_size",
        "activation": "hidden_act hidden_activation activation_function act_fn mlp_activation",
        "experts": "num_experts n_routed_experts num_local_experts n_experts moe_num_experts num_routed_experts",
        "top_k": "num_experts_per_tok num_experts_per_token moe_top_k experts_per_token moe_topk topk n_active_experts "
                 "num_selected_experts",
        "shared_experts": "n_shared_experts num_shared_experts moe_num_shared_experts",
        "balance_loss": "router_aux_loss_coef aux_loss_alpha moe_aux_loss_coeff load_balance_loss",
        "z_loss": "router_z_loss_coef moe_z_loss_coeff",
        "score": "scoring_func router_score_function",
        "normalize": "norm_topk_prob",
        "state_size": "d_state ssm_state_size mamba_d_state n_state state_dim",
        "conv_width": "d_conv conv_kernel mamba_d_conv conv_size",
        "expand": "mamba_expand expansion",
        "groups": "n_groups ngroups mamba_n_groups",
        "chunk": "chunk_size mamba_chunk_size chunk_length",
        "eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon layernorm_epsilon norm_eps",
        "norm": "normalization norm_type normalization_type",
        "feed_forward": "mlp ffn ff feedforward",
        "mixer": "attention attn token_mixer sequence_mixer",
        "learning_rate": "lr max_lr peak_lr base_lr learning_rate_init",
        "weight_decay": "wd decay_rate l2",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "epsilon": "adam_epsilon",
        "warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup_steps",
        "floor": "min_lr min_lr_ratio min_learning_rate final_lr",
        "schedule": "lr_scheduler lr_scheduler_type scheduler learning_rate_schedule lr_schedule",
        "optimizer": "optim",
        "gradient_clip": "max_grad_norm clip_grad grad_clip gradient_clipping clip_grad_norm gradient_clip_val",
        "seed": "random_seed manual_seed torch_seed",
        "validate_every": "eval_steps eval_interval eval_every validation_interval val_every",
        "checkpoint_every": "save_steps save_interval save_every checkpoint_interval",
        "keep_checkpoints": "save_total_limit keep_last",
        "batch": "per_device_train_batch_size batch_size micro_batch_size micro_batch train_batch_size",
        "accumulation": "gradient_accumulation_steps grad_accum accumulate_grad_batches gradient_accumulation",
        "activation_checkpointing": "gradient_checkpointing checkpoint_activations recompute",
        "precision": "torch_dtype dtype mixed_precision",
        "count": "gpus num_gpus n_gpus num_devices devices world_size n_devices",
        "memory_gb": "memory vram vram_gb gpu_memory memory_gib",
        "tflops": "flops peak_tflops peak_flops",
        "memory_bandwidth_gbs": "bandwidth memory_bandwidth",
        "link_bandwidth_gbs": "nvlink link_bandwidth",
        "nodes": "num_nodes n_nodes nnodes machines",
        "interconnect_bandwidth_gbs": "interconnect interconnect_bandwidth infiniband node_bandwidth_gbs",
        "price_per_hour": "price cost cost_per_hour hourly_price",
        "utilisation": "mfu utilization",
        "blocks": "block layer_types block_types modules",
        "tokens": "num_nextn_predict_layers n_predict num_future_tokens",
    }.items() for theirs in foreign.split()
}

#: options of a hardware profile, for whoever looks for them in a spec
PROFILE = frozenset(["batch", "accumulation", "activation_checkpointing", "precision", "count", "nodes", "memory_gb",
                     "tflops", "strategy", "device", "utilisation", "expandable_segments"])

#: a foreign name -> why there is no such option, where a component has none of that name
NOT_HERE: dict[str, str] = {
    theirs: why
    for why, foreign in {
        "no layer here that takes it; biases are the layer's own affair: leave it out, or bring a layer that has them":
            "use_conv_bias",
        "nothing is dropped here; one pass over much text needs no dropout: leave it out":
            "dropout attention_dropout attn_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
            "hidden_dropout_prob attention_probs_dropout_prob residual_dropout resid_dropout embedding_dropout "
            "classifier_dropout",
        "weights begin as their layers initialise them: leave it out":
            "initializer_range init_std initializer_factor initialization",
        "which layers have a window is said by their blocks: window: TOKENS in the mixer of those that do":
            "local_attention use_sliding_window max_window_layers",
        "how long a training lasts is said to `train`: --steps, --tokens or --minutes":
            "max_steps steps epochs num_train_epochs num_epochs max_iters total_steps max_tokens train_tokens "
            "total_tokens minutes n_epochs iterations",
        "what a model learns from is said to `train --data`, or in phases: [{kind: pretrain, data: ...}]":
            "data dataset datasets train_data data_path corpus train_file",
        "the tokenizer is trained on the data; it takes vocab_size alone":
            "tokenizer tokenizer_name tokenizer_path bos_token_id eos_token_id pad_token_id unk_token_id",
        "it has no part in training from scratch: leave it out":
            "use_cache transformers_version auto_map pretraining_tp output_router_logits use_bfloat16",
    }.items() for theirs in foreign.split()
}
