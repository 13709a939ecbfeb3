"""TempoLoRA: LoRAs for Wan 2.2 whose videos move in natural tempo.

Data flows one way: clip -> shard -> step -> checkpoint -> LoRA file -> video -> report.
"""

__version__ = "0.1.0"
