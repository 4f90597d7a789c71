"""C2AM's second network: what can't work is told before the classifier is trained."""
