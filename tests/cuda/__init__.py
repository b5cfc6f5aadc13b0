"""What a GPU will run, tested where there is none."""
