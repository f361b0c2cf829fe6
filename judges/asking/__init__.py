"""Ask models: options, calls, batches, cache, prices."""
