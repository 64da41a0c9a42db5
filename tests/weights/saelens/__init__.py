"""Folders that SAELens wrote, what it computes from them, and the script that made them."""
