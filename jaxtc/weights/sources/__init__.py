"""Where weights come from: the hub, folders, files, the embedded model."""
