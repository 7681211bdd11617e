"""Inside vLLM itself, on any platform whose linear layers take a quantization config (CPUs above all)."""
