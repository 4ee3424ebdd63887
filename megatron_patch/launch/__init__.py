"""From what a user typed to one checked command: positional tables, the plan, the agent. Never imports torch."""
