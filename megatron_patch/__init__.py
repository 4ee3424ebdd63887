"""Conversion, pre-training and fine-tuning of open LLM families at Megatron scale, on GPUs and on a laptop's CPU."""
