"""Questions put to the trainer, each a command of its own; `sweep` is what they share."""
