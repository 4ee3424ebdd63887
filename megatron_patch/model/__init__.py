"""The decoder, built by role from a ModelConfig. Parameter names are Megatron-Core's (Transformer-Engine spec)."""
