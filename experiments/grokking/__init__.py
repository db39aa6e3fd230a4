"""Does Muon grok sooner than AdamW? Small tasks, equal tuning, censored runs: see __main__.py."""
