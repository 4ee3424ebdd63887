"""Pre-training and fine-tuning: one process per rank, `python -m megatron_patch.train` started by its agent."""
