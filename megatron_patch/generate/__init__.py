"""`python3 -m megatron_patch.generate`: answers of a checkpoint to prompts, or a conversation with it."""
