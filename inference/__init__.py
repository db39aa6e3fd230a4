"""A trained model in use. Knows the model, not the trainer."""
