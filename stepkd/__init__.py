"""stepkd: train small language models to reason with correct steps.

Process reward models, step-level preference training and on-policy distillation as thin Lightning modules over pure
loss functions. The package root imports nothing heavy; take what you need from the subpackages.
"""

__version__ = "0.2.0"
