"""The machinery of fits: many starts solved at once, resamples, intervals. `analysis.fit_law` is its face."""
