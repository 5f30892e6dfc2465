"""Averages of the weights: kept while training, rebuilt afterwards at any width."""
