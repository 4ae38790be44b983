"""Does it merge better? A personalisation world small enough to train here, and every method on it."""
