"""Where the model's parameters and a checkpoint's entries meet."""
