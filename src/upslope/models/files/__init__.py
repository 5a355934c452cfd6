"""Where networks come from and go to: folders, safetensors, GGUF, adapters, aliases, runs."""
