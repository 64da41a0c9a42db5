"""What a run changes: edits at sites, as data."""
