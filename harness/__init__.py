"""Around the training itself: settings, machine, log, checkpoints, launcher. An idea opens none of it."""
