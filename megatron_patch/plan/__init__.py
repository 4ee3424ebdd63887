"""What a run will be, before it starts: exact sizes, schedule, memory, and what stands on disk. Never imports torch."""
