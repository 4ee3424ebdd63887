"""Weights on disk: Hugging Face and Megatron checkpoints, read and written by manifest."""
