"""How TinyWan's shipped weights were trained, and what they can do."""
