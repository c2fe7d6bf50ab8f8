"""What a model is worth: perplexity and tasks."""
