"""Tests, one file for each module; run them with ./run.sh test."""
