"""What a training will take before it runs, and what it costs."""
