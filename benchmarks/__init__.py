"""One file per thing timed. Each refuses to time what is not correct, prints a table and writes results/*.json."""
