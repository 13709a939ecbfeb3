"""Clips become shards here, and shards become batches."""
