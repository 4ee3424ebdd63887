"""From what a user typed to one checked command: positional tables, the plan, torchrun. Never imports torch."""
