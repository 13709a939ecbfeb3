"""TempoLoRA: LoRAs for Wan 2.2 whose videos move in natural tempo.

Data flows one way: clip -> shard -> step -> checkpoint -> LoRA file -> video -> report.
"""

__version__ = "0.1.0"


class ConfigError(Exception):
    """A user's mistake: one sentence that says what is wrong, where, and what to do.

    Here, and for all but the decoders by way of `tempolora.config`: these start for every clip, and
    pydantic takes as long to import as all else they need.
    """
