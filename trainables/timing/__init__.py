"""What an iteration takes, beside the released loop."""
