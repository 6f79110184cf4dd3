"""Using a model: scoring, generation over the paged cache, chat."""
