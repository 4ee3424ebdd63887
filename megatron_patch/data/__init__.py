"""From text and token files to batches. It is told its rank and the number of ranks; it never asks."""
