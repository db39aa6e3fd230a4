"""Settings as words key=value, and as the trainer's arguments."""

from collections.abc import Container, Iterable, Mapping

# What a command that trains a few models itself sets, so that they compare.
OWN = ("train_steps", "checkpoint_every", "resume", "run_dir", "log_every", "target_loss", "seed")


def assignments(words: Iterable[str], source: str = "", own: Container[str] = ()) -> dict[str, str]:
    """Settings from words key=value. Raises ValueError, which begins with `source`, for any other word, for a key that
    comes twice, and for one of `own`, which the command sets itself."""
    settings: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if not key.isidentifier() or "" in value.split(",") or key in settings:
            raise ValueError(f"{source}{word!r} is not key=value with a new key; try matrix_lr=0.01")
        if key in own:
            raise ValueError(f"{source}{key} is set by this command itself; leave it out")
        settings[key] = value
    return settings


def arguments(settings: Mapping[str, str]) -> list[str]:
    """The trainer's arguments for settings as typed; colons join the parts of a tuple, as commas do values to try."""
    typed = {key: value if key == "matrix_optimizer" else value.replace(":", ",") for key, value in settings.items()}
    return [f"--{key}={value}" for key, value in typed.items()]
