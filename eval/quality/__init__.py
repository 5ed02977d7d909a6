"""What a model is worth: perplexity, similarity, neighbours."""
