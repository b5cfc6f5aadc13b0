"""What can be shown of a run and of the program without running it at full size."""
