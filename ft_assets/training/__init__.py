"""Stage 2: from split rows to a LoRA adapter."""
