"""The Wan models, and what is laid over them from outside."""
