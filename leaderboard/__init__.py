"""The leaderboard: records that a tool checks, ranks, compares and draws. `python -m leaderboard --help`."""
