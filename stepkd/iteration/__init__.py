"""Iterated training: generate, label, train, evaluate, and again from the new model (``stepkd iterate``)."""
