"""Everything about checkpoints: checks before loading, the loader, devices, quantization."""
