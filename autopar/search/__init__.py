"""The search for the best plan: op strategies, stages, and everything around them."""
