"""Strategies: what turns logits into the next plan."""
