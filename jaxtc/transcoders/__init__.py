"""The dictionaries: transcoders, their metrics, the tokens their features promote."""
