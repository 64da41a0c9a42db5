"""The one idea: sites, positions, and the tap that reads and edits them."""
