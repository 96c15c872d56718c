"""What ``llama-infer`` can do, one module a command."""
