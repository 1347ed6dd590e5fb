"""Text generation: one base model, many LoRA adapters, requests that join and leave a running batch."""
