"""Step scorers: trained process reward models, published ones, prompted judges; and what to do with scores."""
