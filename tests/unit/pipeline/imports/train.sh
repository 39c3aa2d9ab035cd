#!/bin/sh
# musubi-tuner on Klein base 9B
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 \
    src/musubi_tuner/flux_2_train_network.py \
    --model_version klein-base-9b \
    --dit models/flux-2-klein-base-9b.safetensors --vae models/ae.safetensors \
    --text_encoder models/qwen/model-00001-of-00004.safetensors \
    --dataset_config dataset.toml --sdpa \
    --timestep_sampling flux2_shift --weighting_scheme none \
    --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing \
    --lr_scheduler cosine --lr_warmup_steps 50 \
    --network_module networks.lora_flux_2 --network_dim 32 --network_alpha 16 \
    --network_args "exclude_patterns=[r'.*txt_mlp.*']" \
    --fp8_base --fp8_scaled --blocks_to_swap 16 \
    --max_train_steps 1600 --save_every_n_steps 400 --save_precision bf16 --seed 42 \
    --sample_prompts prompts.txt --sample_every_n_steps 400 --sample_at_first \
    --output_dir out --output_name fox --log_with tensorboard --frobnicate 3
