"""The study behind docs/evidence.md: what a LoRA changes in a model that was taught to flicker."""
