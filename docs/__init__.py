"""The documents behind the README, and the command that makes their tables."""
