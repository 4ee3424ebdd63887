"""What this machine has for every command, what it lacks, and what the lack costs. It leaves nothing behind."""
