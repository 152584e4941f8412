"""What a machine has, what its launcher says, and whether a recipe fits on it: asked before a job burns hours."""
