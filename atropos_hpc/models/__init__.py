"""Models that `model.make` creates, each module with its own sources for the cache key."""
