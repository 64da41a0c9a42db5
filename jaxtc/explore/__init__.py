"""What features mean: explanations of a prompt."""
