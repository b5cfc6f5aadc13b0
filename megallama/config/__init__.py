"""What the user may say: settings, presets, how they are read, what makes sense."""
