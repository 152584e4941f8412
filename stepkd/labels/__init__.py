"""Step labels: Monte-Carlo rollouts, exact checkers, outcomes and judges; consensus between any two."""
