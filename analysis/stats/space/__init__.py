"""The searched space: its axes and its stable region."""
