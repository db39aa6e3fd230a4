"""The folder of the committed results."""

from harness.results import RESULTS as RESULTS
