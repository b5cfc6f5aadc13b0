"""What the user may say: the settings, the presets, how they are read, and which combinations make sense."""
