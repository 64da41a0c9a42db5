"""What fits: estimates of a call, and plans for a mesh."""
