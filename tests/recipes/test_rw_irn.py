"""What PSA and IRN refuse before the classifier is trained."""
