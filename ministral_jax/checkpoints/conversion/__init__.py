"""From one checkpoint to another: layouts, adapters, orbax, quantised formats. Streams; never holds a model."""
