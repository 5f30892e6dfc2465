"""What a step is trained for: from the names of a recipe to a loss per sample."""
