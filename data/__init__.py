"""Tokens in, batches out: shard files, the loader, the tokenizers and the tools that make shards."""
