"""Flow matching with rhythm terms, on one process or many."""
