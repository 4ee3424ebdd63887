"""Scores of a checkpoint through lm-eval."""
