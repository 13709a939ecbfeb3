"""What a run leaves behind: LoRA files, videos, the report."""
