"""What a step is trained for: an objective gives a loss per sample and named extras, regularisers add terms to it."""
