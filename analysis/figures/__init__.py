"""The figures, one file a kind. `analysis.plots` is their face."""
